"""steps.csv: a row a step, in order, whatever stops the run; a column more for a quantity more."""

import pandas
import pytest

from helpers import metrics, run
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


def test_a_file_that_could_not_be_written_gets_its_header_later(workplace, monkeypatch):
    def full(path, content):
        raise OSError("no space left")

    log = StepLog("steps.csv", 0)
    log.write(0, loss=1.0)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("training.log.write_whole", full)
        log.flush()
    log.flush()  # what the end of the run does
    assert open("steps.csv").read().splitlines() == ["step,loss", "0,1.0"]
