"""A study: the experiments of SELMA's section 5 over several seeds, in one folder, as tables with intervals.

`arms` turns a recipe into the runs of its experiments and reuses what they share, `run` lists the steps, `tables` writes them down.
"""
