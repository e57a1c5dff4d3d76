"""ModelShape: what a plan needs to know of a model's structure; with it at hand, torch is not needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowvram.engine.config import StepConfig, TaskType
from lowvram.errors import ConfigError
from lowvram.frozen import Frozen

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ANY_LENGTH = 1 << 20
NAMED_TARGETS: dict[str, tuple[str, ...]] = {
    "attention-qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


class LinearShape(Frozen):
    """All linear layers of one name and size; the head is none of them."""

    name: str  # the last part: q_proj
    n_in: int
    n_out: int
    count: int
    biased: bool = False


class ModelShape(Frozen):
    """Counts and widths of a model, whatever its precision."""

    task_type: TaskType
    n_parameters: int
    n_layers: int
    context_limit: int  # positions that it knows, or (T5, whose positions are relative) was trained on
    stacked_parameters: int  # of a mixture's experts, [experts, out, in]: no linear layers in transformers 5
    linears: tuple[LinearShape, ...]  # in order of appearance
    hidden_size: int
    vocab_size: int
    tied: bool  # the head is the embedding
    untiled: str  # why its layers cannot be run by tiles; "" where they can
    unpacked: str  # why examples cannot share a row; "" where they can
    bias_parameters: int = 0  # in all its biases, the norms' and the head's as well
    untrained_biases: str = ""  # why bias=all cannot be had; "" where it can

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear layers but the head."""
        return sum(one.n_in * one.n_out * one.count for one in self.linears)

    @property
    def table_parameters(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.vocab_size * self.hidden_size

    def resolve_targets(self, wish: str | Sequence[str]) -> tuple[str, ...]:
        """Layer names for `all-linear`, `attention`, `attention-qv` (`qv`) or an explicit list.

        Raises:
            ConfigError: a name is no linear layer of this model.
        """
        available = tuple(dict.fromkeys(linear.name for linear in self.linears))
        if not available:
            raise ConfigError(
                "This model has no linear layer that lowvram can adapt.",
                "Use a model with linear layers, such as Llama, Qwen2 or Mistral.",
            )
        if wish == "all-linear":
            return available
        names = NAMED_TARGETS.get("attention-qv" if wish == "qv" else str(wish))
        if names is None:
            names = tuple(n.strip() for n in wish.split(",")) if isinstance(wish, str) else tuple(wish)
        missing = [n for n in names if n not in available]
        if missing:
            raise ConfigError(
                f"This model has no linear layer called {', '.join(missing)}; it has {', '.join(available)}.",
                "Use --targets all-linear, or names from that list.",
            )
        return tuple(dict.fromkeys(names))

    def full_rank(self, targets: Sequence[str]) -> int:
        """Of the largest target layer: above it an adapter adds parameters and no freedom."""
        return max(min(linear.n_in, linear.n_out) for linear in self._adapted(targets))

    def narrowest(self, targets: Sequence[str]) -> int:
        """The least width of any target layer: so many directions they all have."""
        return min(min(linear.n_in, linear.n_out) for linear in self._adapted(targets))

    def n_trainable(self, step: StepConfig) -> int:
        """r * in of A, r * out of B, of DoRA out more, and out of a bias, for every targeted linear layer."""
        if step.inference_mode:
            return 0
        total = self.bias_parameters if step.bias == "all" else 0
        for linear in self._adapted(step.target_modules):
            a = 0 if step.freeze_a else step.rank * linear.n_in
            magnitude = linear.n_out if step.use_dora else 0
            bias = linear.n_out if step.bias == "lora_only" and linear.biased else 0
            total += (a + step.rank * linear.n_out + magnitude + bias) * linear.count
        return total

    def adapted_weights(self, targets: Sequence[str]) -> int:
        """Weights of all layers that get an adapter."""
        return sum(linear.n_in * linear.n_out * linear.count for linear in self._adapted(targets))

    def trains_no_bias(self, step: StepConfig) -> bool:
        """Biases were asked for, and there are none."""
        adapted = any(linear.biased for linear in self._adapted(step.target_modules))
        return (step.bias == "all" and not self.bias_parameters) or (step.bias == "lora_only" and not adapted)

    def _adapted(self, targets: Sequence[str]) -> list[LinearShape]:
        return [linear for linear in self.linears if linear.name in targets]


def context_limit(config: PretrainedConfig) -> int:
    """Positions that a model knows: past the last learned one it fails."""
    text = config.get_text_config()
    known = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(known or _ANY_LENGTH)


def shape_of(config: PretrainedConfig) -> ModelShape:
    """Read off the model that would be built, on the meta device.

    Raises:
        ConfigError: lowvram cannot train such a model.
    """
    from lowvram.engine.biases import n_biases, why_not_all
    from lowvram.engine.linears import in_out_features, is_linear
    from lowvram.engine.model import skeleton
    from lowvram.engine.packing import why_not_packed
    from lowvram.engine.tiles import why_not_tiled

    model = skeleton(config, StepConfig())
    head = model.get_output_embeddings()
    linears = Counter(
        (name.rsplit(".", 1)[-1], *in_out_features(module), module.bias is not None)
        for name, module in model.named_modules()
        if is_linear(module) and module is not head
    )
    text = config.get_text_config()
    return ModelShape(
        task_type="SEQ2SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM",
        n_parameters=sum(p.numel() for p in model.parameters()),
        n_layers=text.num_hidden_layers,
        context_limit=context_limit(config),
        stacked_parameters=sum(p.numel() for p in model.parameters() if p.dim() == 3),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
        untiled=why_not_tiled(model.get_decoder()),
        unpacked=why_not_packed(model.get_decoder()),
        bias_parameters=n_biases(model),
        untrained_biases=why_not_all(model),
        linears=tuple(
            LinearShape(name=name, n_in=n_in, n_out=n_out, count=count, biased=biased)
            for (name, n_in, n_out, biased), count in linears.items()
        ),
    )
