"""A model of ours as EleutherAI's lm-evaluation-harness wants to see one. The command is in benchmark.py.

Every answer of a question is scored by the sum of the log-probabilities of its tokens behind the question.
The likeliest is the model's answer. `acc` takes the sums as they are; `acc_norm` divides them by the answer's
length in bytes. The harness builds the prompts, counts, and tells the standard error of the mean over
questions. This file only lends it a model.

Notable:
- Gates are deterministic, as everywhere when a model is judged.
- Tasks whose answers are a text, or none, are refused.
- Prompts are padded on the right, where no causal model looks. A question that is longer than the model's
  context loses its beginning, as in the harness' own models.
- Needs `pip install lm_eval`, and a network for the questions.
"""

import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from storage.files import UserError


class Harness(TemplateLM):
    """A model of ours as the harness wants to see one. model: a GPT or OLMo; tokens: its text.Tokenizer."""

    def __init__(self, model, tokens, batch_size=16):
        super().__init__()
        self.model, self.tokens, self.batch_size = model.eval(), tokens, batch_size

    @property
    def eot_token_id(self):
        return self.tokens.separator

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return [int(i) for i in self.tokens.encode(string.encode())]

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """For every (_, context ids, continuation ids): (log-probability of the continuation, is it said).

        In nats; it is said if the model would have said it, token by token the likeliest.
        """
        found = {}
        # alike lengths share a batch; the largest first
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        firsts = range(0, len(order), self.batch_size)
        for first in tqdm(firsts, desc="answers", disable=disable_tqdm or None):
            batch = order[first:first + self.batch_size]
            found |= zip(batch, self.score_batch([requests[i] for i in batch]))
        return [found[i] for i in range(len(requests))]

    def score_batch(self, requests):
        """What `_loglikelihood_tokens` returns, of requests that share one batch, the longest first."""
        device, longest = next(self.model.parameters()).device, self.model.config.block_size
        # what does not fit is left away at the beginning
        rows = [(context + continuation)[-longest - 1:] for _, context, continuation in requests]
        x = torch.full((len(rows), len(rows[0]) - 1), self.eot_token_id)
        for row, ids in zip(x, rows):
            row[:len(ids) - 1] = torch.tensor(ids[:-1])
        scores = self.model(x.to(device))[0].float().log_softmax(-1)  # (b, T, V)
        answers = []
        for (_, _, continuation), ids, score in zip(requests, rows, scores):
            # of an answer longer than the context its end
            wanted = torch.tensor(continuation[-len(ids) + 1:], device=device)
            score = score[len(ids) - 1 - len(wanted):len(ids) - 1]  # (answer's tokens, V)
            answers.append((score.gather(-1, wanted[:, None]).sum().item(),
                            bool((score.argmax(-1) == wanted).all())))
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise UserError("one of these tasks has no answers to choose from, and benchmark reports how often "
                        "the right one is chosen")

    generate_until = loglikelihood_rolling


def benchmark(models, tokens, tasks, limit=None, include=None):
    """{task: {metric: {name: [score, standard error]}}}.

    models    {name: function that brings the model}; one is there at a time
    tasks     names, comma-separated
    limit     questions per task
    include   folder of YAML tasks
    """
    manager, table = TaskManager(include_path=include), {}
    unknown = [task for task in tasks.split(",") if task not in manager.all_tasks]
    if unknown:
        raise UserError(f"the harness knows no task {unknown[0]!r}. `lm_eval ls tasks` lists them; "
                        "your own come from --include=FOLDER")
    for name, bring in models.items():
        found = lm_eval.simple_evaluate(Harness(bring(), tokens), tasks=tasks.split(","), limit=limit,
                                        task_manager=manager, bootstrap_iters=1000)
        for task, scores in found["results"].items():
            for metric in ("acc", "acc_norm"):
                if f"{metric},none" in scores:
                    of_models = table.setdefault(task, {}).setdefault(metric, {})
                    of_models[name] = [scores[f"{metric},none"], scores[f"{metric}_stderr,none"]]
    return table


def lines(table):
    """The table as text."""
    first_task = next(iter(table.values()))
    first_metric = next(iter(first_task.values()))
    rows = [f"{'task':24}{'metric':10}" + "".join(f"{name:>20}" for name in first_metric)]
    for task, metrics in table.items():
        for metric, found in metrics.items():
            cells = "".join(f"{score:.3f} +- {error if error == 'N/A' else format(error, '.3f')}".rjust(20)
                            for score, error in found.values())
            rows.append(f"{task:24}{metric:10}{cells}")
    return "\n".join(rows)
