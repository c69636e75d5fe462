"""How well images follow their prompts: questions and their sources, judges, scorers, preference models, suites.

Two ways in by name, for whoever holds images:

    judges.opening.open_judge(JudgeConfig(name=...))   a judge: images and questions in, answers or reasons out
    metrics.open_metric(NAME, judge=..., model=...)    a metric of `metrics.METRICS`: images and prompts in, values or reasons out
"""
