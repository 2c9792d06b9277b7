"""Settings of the trainer; those of its backends lie in their folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from asyncrl.section import Section
from asyncrl.specs import choices, spec_name, with_sections

BACKENDS = "trainer/backends"
"""The folder of those that come with the package."""
Share = Annotated[float, Field(ge=0, lt=1)]


class LoraConfig(Section):
    """Train a low-rank adapter of each model, and leave the model itself as it is."""

    rank: int = Field(16, ge=1)
    """r, of every adapted layer's A [r, in] and B [out, r]."""
    alpha: float = Field(32.0, gt=0)
    """The product B A counts alpha / rank times."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """The linear layers that are adapted, by their last names (`[q_proj, v_proj]`); `all-linear`: all but the
    output head."""


@with_sections(BACKENDS)
class TrainerConfig(Section):
    backend: Annotated[str, AfterValidator(spec_name(BACKENDS))] = Field(
        "torch", description=choices(BACKENDS)
    )
    settings: dict[str, Any] = Field({})
    """Settings of a backend of your own, by its spec's `settings`."""
    ranks: int = Field(1, ge=1)
    """Trainer processes, one a GPU; on the CPU each computes with `trainer.threads`."""
    batch_groups: int = Field(16, ge=1)
    """Groups in a training step (B)."""
    batch_tokens: int | None = Field(None, ge=1)
    """A training step has fewer groups where so many sampled tokens are reached before: its batch ends with
    the group that reaches them, unless groups that must be trained on now remain; null is always
    `batch_groups`."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer updates in a training step."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Tokens in one forward and backward pass; a longer sequence goes alone."""
    share_prompts: bool = True
    """Compute a group's prompt once for all its responses, where the model's attention allows it. Same
    gradient, less work."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to `lr_min_share` at the last step."""
    lr_min_share: float = Field(0.0, ge=0, le=1)
    """Share of `lr` at the end of a linear or cosine schedule."""
    warmup_steps: int = Field(0, ge=0)
    """Training steps over which the learning rate rises linearly."""
    betas: tuple[Share, Share] = Field((0.9, 0.95), strict=False)
    """AdamW's betas."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    fused_kernels: Literal["auto", "never"] = "auto"
    """Fused norms, MLPs and rotary embeddings. `auto`: those of liger-kernel, on a GPU, if it is installed
    and the model is of a family that they are known to be right for."""
    logit_chunk_tokens: int = Field(1024, ge=1)
    """Tokens whose logits exist at the same time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the trainer runs."""
    threads: int = Field(1, ge=1)
    """CPU threads of the trainer."""
    lora: LoraConfig | None = None
    """Train adapters instead of whole models; null trains all weights."""
    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The section of a backend that comes with the package, from its own folder."""
