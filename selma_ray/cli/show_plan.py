"""What the command line shows of a plan."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selma_ray.plan.estimate import plan_recipe, study_hours
from selma_ray.plan.nodes import NodeGroup, node_groups
from selma_ray.run.demands import SERVE
from selma_ray.run.memory import CUDA_BYTES, Need, check_memory
from selma_ray.run.recipe import Recipe
from selma_ray.run.stages import STAGES
from selma_ray.study.plan import plan_study
from selma_ray.study.study import Study

__all__ = ["show_plan", "show_study_plan"]

_GB = 1e9


def show_plan(recipe: Recipe, tflops: float, gpu_gb: float | None = None, *, cluster: bool = False) -> None:
    """Print a recipe's plan at a sustained rate of `tflops` TFLOP/s, whether it fits cards of `gpu_gb`, and a cluster for it."""
    plan = plan_recipe(recipe, gpu_gb and gpu_gb * _GB)
    console = Console(highlight=False, soft_wrap=True)
    parts = ", ".join(f"{name} {_count(count)}" for name, count in plan.parameters.items())
    console.print(f"{escape(recipe.model.name)}: {_count(sum(plan.parameters.values()))} weights ({parts})")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for heading in ("stage", "memory, GB", "GPU-hours", "storage, GB", ""):
        table.add_column(heading, justify="left" if heading in ("stage", "") else "right")
    for stage in plan.stages:
        hours = None if stage.pflop is None else stage.pflop * 1e3 / tflops / 3600
        table.add_row(stage.name, _gb(stage.memory_bytes), _number(hours), _gb(stage.storage_bytes), escape(stage.note))
    known = [stage for stage in plan.stages if stage.pflop is not None]
    hours = sum(stage.pflop or 0 for stage in known) * 1e3 / tflops / 3600
    table.add_row("all", "", _number(hours), _gb(sum(stage.storage_bytes or 0 for stage in plan.stages)), "")
    console.print(table, soft_wrap=False)
    console.print(
        f"Hours at {tflops:g} TFLOP/s sustained (--tflops), without those of the language model and the judge; images are counted\n"
        "uncompressed."
    )
    if plan.needs:
        console.print(_memory_table(plan.needs, gpu_gb), soft_wrap=False)
        console.print(
            f"Beside these, CUDA takes about {CUDA_BYTES / _GB:g} GB of a card in each process; judges of transformers are left out."
        )
    if cluster:
        console.print(_node_table(node_groups(recipe, gpu_gb and gpu_gb * _GB)), soft_wrap=False)
        console.print(
            "Nodes of a group bear the label role=GROUP; with cluster.use_labels=true each stage takes its own."
        )
    if gpu_gb:
        check_memory(recipe, [*STAGES, SERVE], gpu_gb * _GB)


def _memory_table(needs: Sequence[Need], gpu_gb: float | None) -> Table:
    """Return what each process holds of one GPU, and of what it may take."""
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, title="Memory of one GPU, GB", title_justify="left"
    )
    for heading in ("stage", "process", "holds", "may take", ""):
        table.add_column(heading, justify="right" if heading in ("holds", "may take") else "left")
    for need in needs:
        allowed = _gb(need.share * gpu_gb * _GB) if gpu_gb else f"{100 * need.share:.0f}%"
        fits = gpu_gb is None or need.fits(gpu_gb * _GB)
        parts = ", ".join(f"{name} {_gb(amount)}" for name, amount in need.parts.items())
        table.add_row(
            need.stage,
            need.what,
            _gb(need.total_bytes),
            allowed,
            parts if fits else f"[red]does not fit[/red]: {parts}",
        )
    return table


def _node_table(groups: Sequence[NodeGroup]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, title="Nodes", title_justify="left")
    for heading in ("group", "CPUs", "GPUs", "GB a GPU, at least", "nodes"):
        table.add_column(heading, justify="left" if heading == "group" else "right")
    for group in groups:
        counts = str(group.fewest) if group.fewest == group.most else f"{group.fewest} to {group.most}"
        table.add_row(group.role, str(group.cpus), str(group.gpus), _gb(group.card_bytes), counts)
    return table


def show_study_plan(study: Study, tflops: float, gpu_gb: float | None = None) -> None:
    """Print the plan of a study's recipe, and in one line what the study makes in all."""
    show_plan(study.recipe, tflops, gpu_gb)
    made = plan_study(study)
    scored = f"{sum(count for count, _ in made.scored):,}" if made.scored else "an unknown number of"
    Console(highlight=False, soft_wrap=True).print(
        f"The study: {made.runs} runs in all, what they share made once: {made.prompts:,} prompts, "
        f"{sum(count for count, _ in made.images):,} training images, {len(made.experts)} LoRAs of "
        f"{sum(each.steps for each in made.experts):,} steps, {scored} scored images, {_number(study_hours(study, tflops))} GPU-hours"
    )


def _count(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _gb(amount: float | None) -> str:
    return "" if amount is None else _number(amount / _GB)


def _number(amount: float | None) -> str:
    return "" if amount is None else f"{amount:.3g}" if amount < 100 else f"{amount:,.0f}"
