"""The two ends of a run: the untrained model's held-out loss, and the adapter, result and receipt."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from lowvram.engine.adapter_start import saved_as_plain
from lowvram.file_hash import file_sha256
from lowvram.frozen import write_atomically
from lowvram.training import checkpoint
from lowvram.training.evaluation import Evaluations, perplexity
from lowvram.training.finite import require_finite_start
from lowvram.training.receipt import write_receipt
from lowvram.training.result import RunResult
from lowvram.training.resuming import set_adapter
from lowvram.training.stepping import evaluated, held_out_loss

if TYPE_CHECKING:
    from lowvram.training.run import Run


def held_out_before(run: Run) -> float:
    """Loss of the untrained adapter (B is still zero: the base model), once and kept over resumes."""
    if run.loss_before is not None:
        return run.loss_before
    run.view.note(f"Measuring the untrained model on {len(run.data.held_out)} held-out examples")
    loss = held_out_loss(run)
    require_finite_start(run, loss)
    run.view.note(f"Held-out loss before training: {loss:.4f}")
    return loss


def finish(run: Run) -> RunResult:
    """Save the best adapter in plain peft format, result.json and receipt.json."""
    step, after = _best_adapter(run)
    adapter_bytes = save_adapter(run)
    assert run.loss_before is not None
    result = RunResult(
        model=run.plan.model,
        data=str(run.plan.data),
        steps=run.step,
        held_out_loss_before=run.loss_before,
        held_out_loss_after=after,
        same_held_out=run.same_held_out,
        held_out_perplexity_before=perplexity(run.loss_before),
        held_out_perplexity_after=perplexity(after),
        trained_tokens=run.trained_tokens,
        tokens=run.tokens,
        seconds=run.seconds,
        tokens_per_second=run.tokens / max(run.seconds, 1e-9),
        adapter_bytes=adapter_bytes,
        adapter_sha256=file_sha256(run.folder.adapter / "adapter_model.safetensors"),
        adapter_step=step,
        checkpoint_bytes=run.checkpoint_bytes,
        n_checkpoints=run.n_checkpoints,
        checkpoint_seconds=run.checkpoint_seconds,
        stop_reason=_stop_reason(run),
    )
    write_receipt(run)
    write_atomically(run.folder.result_file, result.model_dump_json(indent=2))  # last: now it is finished
    return result


def _best_adapter(run: Run) -> tuple[int, float]:
    """Of the evaluated adapters, the best: its step and held-out loss; the model has it afterwards."""
    found = run.evaluations
    if found.last_loss is None or found.last_step != run.step:
        evaluated(run)
    if found.best_loss is None or found.best_step == run.step:
        run.tell("finish", f"The adapter is that of the last step, {run.step}: {_why_last(found)}")
        return run.step, _last_loss(found)
    path, problem = checkpoint.of_step(run.folder.checkpoints, found.best_step)
    if path is None:
        run.tell("finish", f"{problem}; it was the best: the adapter is that of the last step, {run.step}")
        return run.step, _last_loss(found)
    set_adapter(run, checkpoint.load(path).adapter)
    better = f"held-out loss {found.best_loss:.4f}, against {_last_loss(found):.4f} after step {run.step}"
    run.tell("finish", f"The adapter is the best one, of step {found.best_step}: {better}")
    return found.best_step, found.best_loss


def _why_last(found: Evaluations) -> str:
    if found.best_loss is None:
        return "no held-out loss is a number"
    return f"its held-out loss {found.best_loss:.4f} is the best"


def _last_loss(found: Evaluations) -> float:
    assert found.last_loss is not None
    return found.last_loss


def _stop_reason(run: Run) -> str:
    found = run.evaluations
    if run.step == run.plan.total_steps:
        return "finished"
    n = found.n_since_best
    waited = f"{n} evaluation{'s' if n > 1 else ''} without a better one"
    return f"early stop after {waited} than step {found.best_step}'s"


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
