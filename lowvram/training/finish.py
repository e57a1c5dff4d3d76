"""The two ends of a run: the untrained model's held-out loss, and the adapter, result and receipt."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from lowvram.engine.adapter_start import saved_as_plain
from lowvram.frozen import write_atomically
from lowvram.training.finite import require_finite_start
from lowvram.training.receipt import write_receipt
from lowvram.training.result import RunResult

if TYPE_CHECKING:
    from lowvram.training.run import Run


def held_out_before(run: Run) -> float:
    """Loss of the untrained adapter (B is still zero: the base model), once and kept over resumes."""
    if run.loss_before is not None:
        return run.loss_before
    run.view.note(f"Measuring the untrained model on {len(run.data.held_out)} held-out examples")
    loss = run.held_out_loss()
    require_finite_start(run, loss)
    run.view.note(f"Held-out loss before training: {loss:.4f}")
    return loss


def finish(run: Run) -> RunResult:
    """Save the adapter in plain peft format, result.json and receipt.json."""
    adapter_bytes = save_adapter(run)
    after = run.loss_after if run.loss_after is not None else run.held_out_loss()
    assert run.loss_before is not None
    result = RunResult(
        model=run.plan.model,
        data=str(run.plan.data),
        steps=run.step,
        held_out_loss_before=run.loss_before,
        held_out_loss_after=after,
        trained_tokens=run.trained_tokens,
        tokens=run.tokens,
        seconds=run.seconds,
        tokens_per_second=run.tokens / max(run.seconds, 1e-9),
        adapter_bytes=adapter_bytes,
        stop_reason="finished",
    )
    write_receipt(run)
    write_atomically(run.folder.result_file, result.model_dump_json(indent=2))  # last: now it is finished
    return result


def save_adapter(run: Run) -> int:
    """Write RUN/adapter whole or not at all; returns its bytes.

    peft would look up the base model's embedding size on the hub to decide what to save; the adapter has no
    embedding, so it is told not to.
    """
    temporary = run.folder.path / ".adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    options = {"safe_serialization": True, "save_embedding_layers": False}
    try:
        with saved_as_plain(run.model) as tensors:
            run.model.save_pretrained(str(temporary), state_dict=tensors, **options)
        run.source.tokenizer.save_pretrained(str(temporary))
        shutil.rmtree(run.folder.adapter, ignore_errors=True)
        temporary.replace(run.folder.adapter)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk its room is needed
        raise
    return sum(f.stat().st_size for f in run.folder.adapter.glob("adapter_model*.safetensors"))
