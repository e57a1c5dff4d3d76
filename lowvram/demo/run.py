"""`lowvram demo`: fetch, plan, train, answer before and after, merge; interrupted, it continues."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from lowvram import hardware, pipeline, planning
from lowvram.demo.model import demo_model
from lowvram.engine.generate import Answer, greedy_answers
from lowvram.engine.source import ModelSource
from lowvram.frozen import write_atomically
from lowvram.merge_command import merge_run
from lowvram.plan_view import show_plan
from lowvram.planner.profiles import profile_for
from lowvram.planner.wishes import Wishes
from lowvram.result_view import show_result
from lowvram.shell import typed
from lowvram.training.result import RunResult
from lowvram.training.run import Run
from lowvram.training.run_folder import RunFolder

_HERE = Path(__file__).parent
DATA = _HERE / "answers.jsonl"
_EPOCHS = 3.0
_ANSWER_TOKENS = 80


def run_demo(output: Path, steps: int | None, console: Console) -> None:
    """The whole pipeline; a run that is there is continued, a finished one is shown again."""
    answers = _Answers(output)
    finished = RunFolder(output).finished()
    if finished is None and (output / "plan.yaml").is_file():
        console.print(f"Continuing the demo in {escape(str(output))}")
        result = pipeline.resume(output, console, before=answers.before, after=answers.after)
    else:
        result = finished or _first_run(output, steps, console, answers)
    show_result(result, output, console)
    answers.show(console)
    if not (output / "merged").exists():
        merge_run(output, None, console)
    _next(output, console)


def _first_run(output: Path, steps: int | None, console: Console, answers: _Answers) -> RunResult:
    source = ModelSource(demo_model(lambda text: console.print(f"[dim]{escape(text)}")))
    here = hardware.probe()
    wishes = Wishes(precision="nf4", epochs=_EPOCHS, steps=steps)  # as on a small GPU
    with console.status("planning: running the training step on meta tensors"):
        planned = planning.plan_for(source, str(DATA), here, profile_for(here), wishes, lambda _: None)
    show_plan(planned.plan, console)
    return pipeline.start(planned, output, console, before=answers.before, after=answers.after)


class _Answers:
    """The model's answers to three questions that are not in the data, before and after."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "answers.json"
        self._prompts: list[str] = json.loads((_HERE / "prompts.json").read_text(encoding="utf-8"))

    def before(self, run: Run) -> None:
        if run.step == 0:
            self._ask(run, "before")
            torch.cuda.empty_cache()  # what generating left reserved is not the plan's; nothing without CUDA

    def after(self, run: Run) -> None:
        self._ask(run, "after")

    def _ask(self, run: Run, when: str) -> None:
        run.view.note(f"Asking {len(self._prompts)} questions {when} training")
        answers = greedy_answers(
            run.model,
            run.source.tokenizer,
            self._prompts,
            max_new_tokens=_ANSWER_TOKENS,
        )
        known = self._read() | {when: answers}
        told = {when: [answer.model_dump() for answer in given] for when, given in known.items()}
        write_atomically(self._file, json.dumps(told, indent=2, ensure_ascii=False))

    def _read(self) -> dict[str, list[Answer]]:
        if not self._file.is_file():
            return {}
        told = json.loads(self._file.read_text(encoding="utf-8"))
        if any(isinstance(answer, str) for given in told.values() for answer in given):
            return {}  # as versions wrote them that did not look whether an answer ended
        return {when: [Answer(**answer) for answer in given] for when, given in told.items()}

    def show(self, console: Console) -> None:
        """Before and after side by side, and how many ended by themselves."""
        answers = self._read()
        width = max(30, (console.width - 4) // 2)
        for index, prompt in enumerate(self._prompts):
            console.print(f"\n[bold]{escape(prompt)}")
            panels = [
                _panel(answers[when][index], when, width, color)
                for when, color in (("before", "dim"), ("after", "green"))
                if when in answers
            ]
            console.print(Columns(panels))
        for when, given in answers.items():
            ended = sum(answer.stopped for answer in given)
            console.print(f"{when} training {ended} of {len(given)} answers ended with the stop token")


def _panel(answer: Answer, when: str, width: int, color: str) -> Panel:
    cut = None if answer.stopped else f"goes on after {_ANSWER_TOKENS} tokens"
    return Panel(Text(answer.text.strip()), title=when, subtitle=cut, width=width, border_style=color)


def _next(output: Path, console: Console) -> None:
    console.print("\n[bold]What you can do now")
    console.print(f"  lowvram chat {escape(typed(output))} --compare")
    console.print(f"  lowvram export {escape(typed(output))} --to ollama")
    console.print(f"  {escape(str(output / 'adapter'))}: load it with peft.PeftModel.from_pretrained")
    console.print(f"  {escape(str(output / 'merged'))}: load it with plain transformers")
    console.print("  lowvram plan --model Qwen/Qwen2-7B --vram 8GB")
    console.print("  lowvram auto --model YOUR_MODEL --data YOUR.jsonl")
