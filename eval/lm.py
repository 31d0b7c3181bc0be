"""The lm-eval model class `qdeltanet`: HFLM over a quantized model. Importing this module registers it."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from .._processes import current
from ..backends import AUTO
from ..core import QDeltaNetError
from .batches import Request, fitted, generation_batches
from .cache import claim, executed_digest, tokenizer_digest
from .divergence import Divergence, divergences
from .embedded import model_path
from .prefix import Score, Shared, score_of, share_prefixes, shared_logits, span
from .prepare import prepare_from_args


@register_model("qdeltanet")
class QDeltaNetLM(HFLM):
    """`--model qdeltanet --model_args pretrained=NAME,recipe=int8,calibration=DIR,qdeltanet_backend=auto`.

    pretrained may also be a model object (then with tokenizer=). lm-eval's --use_cache does not know recipes: its keys
    would serve one recipe's answers to another, so here a cache belongs to what wrote it first, and others are refused.

    beside: a model whose logits are compared with this one's, batch by batch, so that memory does not depend on the
    number of documents; `compared` then holds a Divergence for each (task, document) with likelihoods. `work` counts
    this process's tokens and seconds: `scored` and `scored_seconds` of likelihoods, `generated` and its seconds.

    Requests whose inputs are prefixes of one another share a forward pass. That is exact for a causal model; dynamic
    scales look at a whole chunk, so there a query is scored as in the prefill of its sequence.

    Several processes (`_processes.joined`) share the batches, which are formed the same for any number of them; every
    one has all scores, and lm-eval believes each alone. Its own way deals out documents: batches, and with them the
    last bits of float sums, would depend on the number of processes, and queries of one sequence would be torn apart.
    """

    def __init__(
        self,
        pretrained: Any,
        recipe: str | None = None,
        calibration: str | None = None,
        execution: str = "integer",
        qdeltanet_backend: str = AUTO,
        beside: Any = None,
        **kwargs: Any,
    ) -> None:
        self._request = {
            "recipe": recipe,
            "calibration": calibration,
            "execution": execution,
            "backend": qdeltanet_backend,
        }
        self._processes = current()
        self._beside, self._asked = beside, list[Any]()
        self.compared: dict[Any, Divergence] = {}
        self.work: Counter[str] = Counter()
        given = isinstance(pretrained, str)
        kwargs["device"] = self._placed = self._place(kwargs.get("device")) if given else str(pretrained.device)
        kwargs.setdefault("max_length", 2048)
        super().__init__(pretrained=model_path(pretrained) if given else pretrained, **kwargs)
        self._rank, self._world_size = 0, 1  # HFLM knows of accelerate's processes, if only of those with a GPU each

    def _create_model(self, pretrained: str, dtype: Any = "float32", **kwargs: Any) -> None:
        asked = dict(self._request)
        recipe, calibration = asked.pop("recipe"), asked.pop("calibration")
        asked["dtype"] = "float32" if dtype in (None, "auto") else dtype
        self._device = torch.device(self._placed)  # HFLM takes a GPU that it finds
        self._model = prepare_from_args(pretrained, recipe, calibration, device=self._placed, **asked)

    def _place(self, device: str | None) -> str:
        """Where nothing is asked for, lm-eval's command line asks for cuda:0, and HFLM takes what there is."""
        kind = torch.device(device or "cpu").type
        return self._processes.device("cpu" if kind == "cuda" and not torch.cuda.is_available() else device or "cpu")

    def get_model_info(self) -> dict[str, Any]:
        return {"qdeltanet": self._request}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Raises QDeltaNetError for a cache with several processes (theirs would differ, and so would their batches),
        and for one that holds the answers of other weights, another recipe, calibration or execution."""
        if cache_hook.dbdict is not None:
            if self._processes.world > 1:
                raise QDeltaNetError("--use_cache: several processes would each have their own; leave it out")
            claim(
                cache_hook.dbdict,
                {**self._reading(), "request": self._request, "executed": executed_digest(self.model)},
            )
        super().set_cache_hook(cache_hook)

    def _reading(self) -> dict[str, Any]:
        """What turns text into requests: lm-eval's keys are texts."""
        return {
            "tokenizer": tokenizer_digest(self.tokenizer),
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
        }

    # -- likelihoods ---------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Score]:
        self._asked = [(request.task_name, request.doc_id) for request in requests]
        result: list[Score] = super().loglikelihood(requests, disable_tqdm or self._silent)
        return result

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: the sum over windows of at most max_length tokens, all of which are batched together."""
        windows = [self._windows(request.args[0]) for request in requests]
        pairs = zip(requests, windows, strict=True)
        self._asked = [(request.task_name, request.doc_id) for request, own in pairs for _ in own]
        scores = iter(self._loglikelihood_tokens([w for own in windows for w in own], disable_tqdm))
        totals = [sum(next(scores)[0] for _ in own) for own in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> list[Request]:
        tokens = self.tok_encode(text)
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
        return [(None, *make_disjoint_window(window)) for window in windows]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        fitting = [fitted(request, self.max_length) for request in requests]
        groups = share_prefixes([(context + target)[:-1] for _, context, target in fitting])
        size = override_bs or self._batch_length(groups)
        batches = [groups[start : start + size] for start in range(0, len(groups), size)]
        with self._bar("loglikelihood", len(requests), disable_tqdm) as bar:

            def score(batch: list[Shared]) -> list[tuple[int, Score, Divergence | None]]:
                found: list[tuple[int, Score, Divergence | None]] = []
                others = self._others(batch)
                for n, (group, logits) in enumerate(zip(batch, self._logits(batch), strict=True)):
                    apart: Any = [None] * len(group.members)
                    if others is not None:
                        apart = divergences(others[n], logits, [span(*fitting[i][1:]) for i in group.members])
                    scored = [score_of(logits, *fitting[i][1:]) for i in group.members]
                    found += zip(group.members, scored, apart, strict=True)
                bar.update(len(found) * self._processes.world)
                return found

            answers = [a for found in self._processes.share(batches, score) for a in found]
        scores = {i: score for i, score, _ in answers}
        self._note({i: apart for i, _, apart in answers if apart is not None})
        for i, request in enumerate(requests):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], scores[i])
        return [scores[i] for i in range(len(requests))]

    def _batch_length(self, groups: Sequence[Shared]) -> int:
        """Of `batch_size=auto` what the longest input leaves room for, on the process with least."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        longest = [(None, list(groups[0].tokens), [0])] if groups else None
        self.batch_sizes = {0: min(self._processes.gather(int(self._detect_batch_size(longest))))}
        return self.batch_sizes[0]

    def _note(self, apart: dict[int, Divergence]) -> None:
        """Add up by document, in the order of the requests: sums of floats do not depend on the batches."""
        for i in sorted(apart):
            before = self.compared.get(self._asked[i], Divergence(0.0, 0, 0))
            self.compared[self._asked[i]] = before.plus(apart[i])

    def _others(self, groups: list[Shared]) -> Tensor | None:
        """The other model's logits of a batch, if there is one."""
        return None if self._beside is None else shared_logits(self._beside, groups, self.device)

    def _logits(self, groups: list[Shared]) -> Tensor:
        start = time.perf_counter()
        logits = shared_logits(self.model, groups, self.device)
        self._worked("scored", sum(len(g.tokens) for g in groups), start)
        return logits

    def _worked(self, what: str, tokens: int, start: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.work.update({what: tokens, f"{what}_seconds": time.perf_counter() - start})

    # -- generation ----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """As HFLM does, a batch at a time; sampling starts from a seed of the batch's own."""
        generate, seed = super().generate_until, torch.initial_seed()
        asked: Any = self.batch_size_per_gpu  # type: ignore[has-type]
        self.batch_size_per_gpu = self._batch_length([])
        batches = generation_batches([r.args for r in requests], self.batch_size_per_gpu, self.tok_encode)
        with self._bar("generate_until", len(requests), disable_tqdm) as bar:

            def answer(numbered: tuple[int, list[int]]) -> list[tuple[int, str]]:
                number, members = numbered
                torch.manual_seed((seed + number) % 2**63)
                texts = generate([requests[i] for i in members], disable_tqdm=True)
                bar.update(len(members) * self._processes.world)
                return list(zip(members, texts, strict=True))

            try:
                shared = self._processes.share(list(enumerate(batches)), answer)
            finally:
                self.batch_size_per_gpu = asked
        texts = dict(pair for found in shared for pair in found)
        return [texts[i] for i in range(len(requests))]

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        start = time.perf_counter()
        made: Tensor = super()._model_generate(context, *args, **kwargs)
        self._worked("generated", made.shape[0] * (made.shape[1] - context.shape[1]), start)
        return made

    # -- progress ------------------------------------------------------------------------------------------------------

    @property
    def _silent(self) -> bool:
        return not (sys.stderr.isatty() and self._processes.first)

    def _bar(self, what: str, total: int, hidden: bool) -> Any:
        return tqdm(total=total, disable=hidden or self._silent, desc=what)
