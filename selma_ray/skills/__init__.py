"""Skills: what each expert is taught."""

from selma_ray.skills.loader import Skill, SkillSampling, load_skill, load_skills, packaged_skills

__all__ = ["Skill", "SkillSampling", "load_skill", "load_skills", "packaged_skills"]
