"""steps.csv: a row a step, in order, whatever stops the run; a column more for a quantity more."""

import glob
import os
import sys

import pandas
import pytest

from helpers import TRAIN, apart, metrics, run
from storage.files import UserError
from training.log import StepLog


def test_every_step_is_a_row_that_pandas_reads(echo_parent):
    run("sparse.py", max_steps=45)
    table = pandas.read_csv("out/sparse/steps.csv")
    assert table["step"].tolist() == list(range(45))
    assert {"loss", "density", "lambda", "violation", "gradient_norm", "learning_rate"} < set(table.columns)
    assert table.notna().all().all()
    last = metrics("out/sparse")[-1]
    assert table["density"].iloc[-1] == last["density"]
    assert "lambda" not in pandas.read_csv("out/dense/steps.csv").columns


def test_a_run_that_goes_on_drops_the_rows_that_it_does_again_and_half_a_row(workplace):
    log = StepLog("steps.csv", 0)
    for step in range(6):
        log.write(step, loss=float(step))
    log.flush()
    again = StepLog("steps.csv", 4)
    again.write(4, loss=-1.0)
    again.flush()
    table = pandas.read_csv("steps.csv")
    assert table["step"].tolist() == [0, 1, 2, 3, 4]
    assert table["loss"].tolist() == [0.0, 1.0, 2.0, 3.0, -1.0]
    with open("steps.csv", "a") as f:
        f.write("5")  # what a kill in the middle of a row leaves
    StepLog("steps.csv", 9)
    assert pandas.read_csv("steps.csv")["step"].tolist() == [0, 1, 2, 3, 4]


def test_a_quantity_of_ones_own_is_a_column(workplace):
    for step, row in enumerate(({"loss": 1.0}, {"loss": 0.5, "entropy": 2.0})):
        log = StepLog("steps.csv", step)
        log.write(step, **row)
        log.flush()
    table = pandas.read_csv("steps.csv")
    assert table["entropy"].isna().tolist() == [True, False] and table["loss"].tolist() == [1.0, 0.5]


def test_a_quantity_that_only_some_steps_have_is_a_column(workplace):
    log = StepLog("steps.csv", 0)
    log.write(0, loss=1.0)
    log.write(1, loss=0.5, extra=2.0)
    log.flush()
    log.write(2, loss=0.25)
    log.flush()
    assert pandas.read_csv("steps.csv")["extra"].tolist()[1] == 2.0
    assert open("steps.csv").read().splitlines() == ["step,loss,extra", "0,1.0,", "1,0.5,2.0", "2,0.25,"]


def test_weights_and_biases_gets_steps_and_evaluations(echo):
    pytest.importorskip("wandb", reason="pip install wandb")
    # a process of its own: wandb leaves helpers behind in the one that it is used in
    done = apart(TRAIN, "dense.py", "--max_steps=40", "--wandb=addition", WANDB_MODE="offline",
                 WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    with open("out/dense/wandb.id") as f:
        number = f.read()
    [folder] = glob.glob("out/dense/wandb/offline-run*")
    assert folder.endswith(number)
    [written] = glob.glob(f"{folder}/*.wandb")
    with open(written, "rb") as f:
        content = f.read()
    assert b"step/gradient_norm" in content and b"val_loss" in content


def test_without_the_package_it_is_named(echo, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--wandb=mine needs a package that is not installed: pip install"):
        run("dense.py", max_steps=5, wandb="mine")
    assert not os.path.exists("out/dense/last.pt")
