"""A model of ours as EleutherAI's lm-evaluation-harness wants to see one. The command is in benchmark.py.

Every answer of a question is scored by the sum of the log-probabilities of its tokens behind the question; the likeliest is the model's answer. `acc` takes
the sums as they are, `acc_norm` divides them by the answer's length in bytes. The harness builds the prompts, counts, and tells the standard error
of the mean over questions; this file only lends it a model.

Notable: gates are deterministic, as everywhere when a model is judged. Prompts are padded on the right, where no causal model looks. A question that is longer than
the model's context loses its beginning, as in the harness' own models. Needs `pip install lm_eval`, and a network for the questions.
"""

import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from analysis.sample import generate
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
        """For every (_, context ids, continuation ids): the continuation's log-probability in nats, and whether it is what the model would have said."""
        device, longest = next(self.model.parameters()).device, self.model.config.block_size
        found = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))  # alike lengths share a batch; the largest first
        for first in tqdm(range(0, len(order), self.batch_size), desc="answers", disable=disable_tqdm):
            batch = order[first:first + self.batch_size]
            rows = [(requests[i][1] + requests[i][2])[-longest - 1:] for i in batch]  # what does not fit is left away at the beginning
            x = torch.full((len(rows), len(rows[0]) - 1), self.eot_token_id)
            for row, ids in zip(x, rows):
                row[:len(ids) - 1] = torch.tensor(ids[:-1])
            scores = self.model(x.to(device))[0].float().log_softmax(-1)  # (b, T, V)
            for i, ids, score in zip(batch, rows, scores):
                wanted = torch.tensor(requests[i][2][-len(ids) + 1:], device=device)  # of an answer longer than the context its end
                score = score[len(ids) - 1 - len(wanted):len(ids) - 1]  # (answer's tokens, V)
                found[i] = (score.gather(-1, wanted[:, None]).sum().item(), bool((score.argmax(-1) == wanted).all()))
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-probability of whole texts, in windows of the model's context."""
        totals = []
        for (string,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(string), prefix_token=self.prefix_token_id, max_seq_len=self.model.config.block_size, context_len=1)
            totals.append(sum(score for score, _ in self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows], disable_tqdm=True)))
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        """Greedy text, up to the first of the request's stop strings."""
        texts = []
        for context, options in (request.args for request in tqdm(requests, desc="texts", disable=disable_tqdm)):
            stops, most, said = options.get("until") or [], options.get("max_gen_toks", 256), []
            ids = (self.tok_encode(context) or [self.eot_token_id])[-max(self.model.config.block_size - most, 1):]  # room for the text, as in the harness' own models
            for token, _ in generate(self.model, torch.tensor([ids], device=next(self.model.parameters()).device), most, temperature=0):
                said.append(token)
                if token == self.eot_token_id or any(stop in self.tokens.decode(said) for stop in stops):
                    break
            text = self.tokens.decode(said[:-1] if said and said[-1] == self.eot_token_id else said)
            texts.append(min((text.partition(stop)[0] for stop in stops), key=len, default=text))
        return texts


def benchmark(models, tokens, tasks, limit=None, include=None):
    """{task: {metric: {name: [score, standard error]}}}. models: {name: function that brings the model}, one is there at a time; tasks: names, comma-separated; limit: questions per task; include: folder of YAML tasks."""
    manager, table = TaskManager(include_path=include), {}
    if unknown := [task for task in tasks.split(",") if task not in manager.all_tasks]:
        raise UserError(f"the harness knows no task {unknown[0]!r}. `lm_eval ls tasks` lists them; your own come from --include=FOLDER")
    for name, bring in models.items():
        results = lm_eval.simple_evaluate(Harness(bring(), tokens), tasks=tasks.split(","), limit=limit, task_manager=manager, bootstrap_iters=1000)["results"]
        for task, found in results.items():
            for metric in ("acc", "acc_norm"):
                if f"{metric},none" in found:
                    table.setdefault(task, {}).setdefault(metric, {})[name] = [found[f"{metric},none"], found[f"{metric}_stderr,none"]]
    return table


def lines(table):
    """The table as text."""
    names = list(next(iter(next(iter(table.values())).values())))
    rows = [f"{'task':24}{'metric':10}" + "".join(f"{name:>20}" for name in names)]
    for task, metrics in table.items():
        for metric, found in metrics.items():
            rows.append(f"{task:24}{metric:10}" + "".join(f"{f'{score:.3f} +- ' + (error if isinstance(error, str) else f'{error:.3f}'):>20}" for score, error in found.values()))
    return "\n".join(rows)
