"""The lm-eval model class `qdeltanet`: HFLM over a quantized model. Importing this module registers it."""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..core import QDeltaNetError
from .embedded import model_path
from .prepare import prepare_from_args


@register_model("qdeltanet")
class QDeltaNetLM(HFLM):
    """`--model qdeltanet --model_args pretrained=NAME,recipe=int8,calibration=DIR,execution=integer,backend=cpu`.

    pretrained may also be a model object (then with tokenizer=). lm-eval's --use_cache does not know recipes: its keys
    would serve one recipe's answers to another, so do not use it with this class.
    """

    def __init__(
        self,
        pretrained: Any,
        recipe: str | None = None,
        calibration: str | None = None,
        execution: str = "integer",
        qdeltanet_backend: str = "cpu",
        **kwargs: Any,
    ) -> None:
        self._request = {
            "recipe": recipe,
            "calibration": calibration,
            "execution": execution,
            "backend": qdeltanet_backend,
        }
        kwargs.setdefault("device", "cpu")
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
