"""What a run became: every question that analyze.py answers.

1. report.py   numbers of a run; report_figures.py: its pictures; figures.py and circuit_figures.py draw
2. explain.py  when every edge of an addition model opens, and what for; conditions.py: in which words;
               questions.py: sums, prompts and edges as they are typed
3. seeds.py    the same run with many seeds, or with one change at a time; curve.py: edges over loss
   baselines.py   other ways to cut edges, which rules.py has
   circuit.py  how small a task's circuit is, dense and sparse; the tasks; which heads copy;
               circuit_table.py: its table
4. transcode.py, graph.py   features and heads behind an answer; graphs.py: behind many, what opens an edge,
               and are a sparse model's graphs smaller?
5. sample.py   text, and what every token read; benchmark.py: standard benchmarks, to which
               harness.py lends a model
6. bench.py    how fast the gate is, alone and in a whole model

Imports everything but train and analyze.
"""
