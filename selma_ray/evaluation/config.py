"""How models are evaluated."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from selma_ray.config import Placement, StrictModel
from selma_ray.judging.config import JudgeConfig, JudgeSetting
from selma_ray.models.config import ModelConfig, SamplingConfig

__all__ = ["ANSWERS", "SECOND_ANSWERS", "EvaluationConfig", "OtherModel", "OtherResult"]

ANSWERS, SECOND_ANSWERS = "answers", "second_answers"
"""Folders of the judge's answers and of the second judge's, beside a model's images."""

ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][\w.-]*$")]


class OtherModel(StrictModel):
    """A model beside those of the run."""

    model: ModelConfig = ModelConfig()
    """Its pipeline."""
    adapter_dir: str | None = None
    """Folder of a PEFT adapter that is folded into it."""


class OtherResult(StrictModel):
    """A model that another run has evaluated, to be set beside this run's."""

    run_dir: str
    """The other run's folder."""
    model: str = "merged"
    """The model's name in that run."""


class EvaluationConfig(StrictModel):
    """Which prompts are rendered by which models, and how their images are scored."""

    suite: str = "miniature"
    """`miniature` (its fixed held-out captions), `miniature-exact` (the same, “a” being asked to be exactly one) or a JSON Lines file of
    prompts with questions."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Prompts taken from the suite, spread evenly over its skills; default: all."""
    seeds: tuple[int, ...] = (0,)
    """Sampling seeds; every model renders every prompt once for each."""
    sampling: SamplingConfig = SamplingConfig()
    """How each image is sampled, the same for every model."""
    experts: bool = True
    """Evaluate each expert on its own beside base and merged."""
    models: dict[ModelName, OtherModel] = Field(default_factory=dict)
    """More models that draw the same prompts from the same seeds, by the names they get in the tables."""
    batch_size: int = Field(default=16, ge=1)
    """Images one pipeline call renders."""
    renderers: Placement[int] = Field(default=1, ge=1)
    """Renderer actors for each model."""
    num_cpus: Placement[float] = Field(default=1, gt=0)
    """CPUs of a renderer."""
    num_gpus: Placement[float] = Field(default=0, ge=0)
    """GPUs of a renderer."""
    judges: Placement[int] = Field(default=0, ge=0)
    """Judges in actors of their own, fed by the renderers; 0 keeps a judge beside each renderer, in its process."""
    max_failed_fraction: Placement[float] = Field(default=0.05, ge=0, le=1)
    """Share of a model's images without any score above which the stage stops."""
    compare_with: Placement[dict[str, OtherResult]] = Field(default_factory=dict)
    """Models of other runs that the tables show too, by the names they get there."""
    allow_other_judge: Placement[bool] = False
    """Compare with results of another judge all the same; their figures then differ for the judge's sake as well."""
    dsg_scorer: Literal["official", "dpg", "selma"] = "official"
    """Which of DSG's scorers the table shows."""
    calibration_scenes: int = Field(default=200, ge=0)
    """Drawn scenes with known truth that the judge is asked about, on the miniature's own suite; 0 asks about none."""
    bootstrap_resamples: int = Field(default=2000, ge=100)
    """Resamples behind each confidence interval."""
    judge: JudgeSetting = JudgeConfig()
    """The judge: its name, or its settings."""
    second_judge: Placement[JudgeSetting | None] = None
    """A judge that is asked the same questions about the same images, and whose figures stand beside the first's; it should never have
    been a reward. It is asked where the first is. Default: none."""

    @model_validator(mode="after")
    def _judges_differ(self) -> "EvaluationConfig":
        second = self.second_judge
        if second and (second.name, second.revision) == (self.judge.name, self.judge.revision):
            raise ValueError(f"second_judge must be another judge than evaluation.judge, got {second.name} for both")
        return self
