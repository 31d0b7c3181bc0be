"""The lm-eval model class `qdeltanet`: HFLM over a quantized model. Importing this module registers it."""

from __future__ import annotations

import sys
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
from .embedded import model_path
from .prefix import Shared, share_prefixes
from .prepare import prepare_from_args

Score = tuple[float, bool]


@register_model("qdeltanet")
class QDeltaNetLM(HFLM):
    """`--model qdeltanet --model_args pretrained=NAME,recipe=int8,calibration=DIR,qdeltanet_backend=auto`.

    pretrained may also be a model object (then with tokenizer=). lm-eval's --use_cache does not know recipes: its keys
    would serve one recipe's answers to another, so do not use it with this class.

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
        **kwargs: Any,
    ) -> None:
        self._request = {
            "recipe": recipe,
            "calibration": calibration,
            "execution": execution,
            "backend": qdeltanet_backend,
        }
        self._processes = current()
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
        """Raises QDeltaNetError for a cache with several processes: theirs would differ, and so would their batches."""
        if self._processes.world > 1 and cache_hook.dbdict is not None:
            raise QDeltaNetError("--use_cache: several processes would each have their own; leave it out")
        super().set_cache_hook(cache_hook)

    # -- likelihoods ---------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Score]:
        result: list[Score] = super().loglikelihood(requests, disable_tqdm or self._silent)
        return result

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: the sum over windows of at most max_length tokens, all of which are batched together."""
        windows = [self._windows(request.args[0]) for request in requests]
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

            def score(batch: list[Shared]) -> list[tuple[int, Score]]:
                found = []
                for group, logits in zip(batch, self._logits(batch), strict=True):
                    found += [(i, _score(logits, *fitting[i][1:])) for i in group.members]
                bar.update(len(found) * self._processes.world)
                return found

            scores = dict(pair for found in self._processes.share(batches, score) for pair in found)
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

    def _logits(self, groups: list[Shared]) -> Tensor:
        """[len(groups), longest, vocabulary]. Shorter inputs are padded on the right and masked: a dynamic scale
        must not see what the padding tokens would have held."""
        width = max(len(g.tokens) for g in groups)
        rows = [[*g.tokens, *[0] * (width - len(g.tokens))] for g in groups]
        mask = [[1] * len(g.tokens) + [0] * (width - len(g.tokens)) for g in groups]
        tokens = torch.tensor(rows, device=self.device)
        padded = None if all(len(g.tokens) == width for g in groups) else torch.tensor(mask, device=self.device)
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=tokens, attention_mask=padded, use_cache=False).logits
        return logits

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

    # -- progress ------------------------------------------------------------------------------------------------------

    @property
    def _silent(self) -> bool:
        return not (sys.stderr.isatty() and self._processes.first)

    def _bar(self, what: str, total: int, hidden: bool) -> Any:
        return tqdm(total=total, disable=hidden or self._silent, desc=what)


def _score(logits: Tensor, context: list[int], target: list[int]) -> Score:
    """Log-likelihood of the target after the context, and whether greedy decoding gives it. logits: [T, vocabulary]."""
    stop = len(context) + len(target) - 1
    log_probs = torch.log_softmax(logits[stop - len(target) : stop].float(), dim=-1)
    wanted = torch.tensor(target, device=logits.device)
    total = log_probs.gather(1, wanted[:, None]).sum()
    return float(total), bool((log_probs.argmax(-1) == wanted).all())
