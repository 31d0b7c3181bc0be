"""The lm-eval model class `qdeltanet`: HFLM over a quantized model. Importing this module registers it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from ..backends import AUTO
from ..core import QDeltaNetError
from .embedded import model_path
from .prefix import Shared, share_prefixes
from .prepare import prepare_from_args

Request = tuple[Any, list[int], list[int]]
Score = tuple[float, bool]


@register_model("qdeltanet")
class QDeltaNetLM(HFLM):
    """`--model qdeltanet --model_args pretrained=NAME,recipe=int8,calibration=DIR,qdeltanet_backend=auto`.

    pretrained may also be a model object (then with tokenizer=). lm-eval's --use_cache does not know recipes: its keys
    would serve one recipe's answers to another, so do not use it with this class.

    Requests whose inputs are prefixes of one another share a forward pass. That is exact for a causal model; dynamic
    scales look at a whole chunk, so there a query is scored as in the prefill of its sequence.
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
        kwargs.setdefault("device", "cpu" if isinstance(pretrained, str) else str(pretrained.device))
        kwargs.setdefault("max_length", 2048)
        name = model_path(pretrained) if isinstance(pretrained, str) else pretrained
        super().__init__(pretrained=name, **kwargs)

    def _create_model(self, pretrained: str, dtype: Any = "float32", **kwargs: Any) -> None:
        asked = dict(self._request)
        recipe, calibration = asked.pop("recipe"), asked.pop("calibration")
        asked["dtype"] = "float32" if dtype in (None, "auto") else dtype
        try:
            self._model = prepare_from_args(pretrained, recipe, calibration, **asked)
        except QDeltaNetError as e:
            raise SystemExit(f"qdeltanet: {e}") from e

    def get_model_info(self) -> dict[str, Any]:
        return {"qdeltanet": self._request}

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Score]:
        result: list[Score] = super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())
        return result

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        result: list[float] = super().loglikelihood_rolling(requests, disable_tqdm or not sys.stderr.isatty())
        return result

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        batch = override_bs or self.batch_size
        too_long = any(len(context) + len(target) > self.max_length + 1 for _, context, target in requests)
        if too_long or not isinstance(batch, int):  # lm-eval truncates, or finds its own batch size
            result: list[Score] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return result
        groups = share_prefixes([(context + target)[:-1] for _, context, target in requests])
        scores: list[Score | None] = [None] * len(requests)
        hidden = disable_tqdm or override_bs is not None or not sys.stderr.isatty()
        with tqdm(total=len(requests), disable=hidden, desc="loglikelihood") as bar:
            for start in range(0, len(groups), batch):
                part = groups[start : start + batch]
                for group, logits in zip(part, self._logits(part), strict=True):
                    for i in group.members:
                        scores[i] = _score(logits, *requests[i][1:])
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], scores[i])
                    bar.update(len(group.members))
        return [s for s in scores if s is not None]

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


def _score(logits: Tensor, context: list[int], target: list[int]) -> Score:
    """Log-likelihood of the target after the context, and whether greedy decoding gives it. logits: [T, vocabulary]."""
    stop = len(context) + len(target) - 1
    log_probs = torch.log_softmax(logits[stop - len(target) : stop].float(), dim=-1)
    wanted = torch.tensor(target, device=logits.device)
    total = log_probs.gather(1, wanted[:, None]).sum()
    return float(total), bool((log_probs.argmax(-1) == wanted).all())
