"""Work in several processes: order, errors, and processes that end."""

import os
import time

import pytest
import torch

from attnkd.demo.workers import workers


class Work:
    def __init__(self, say):
        self.say = say

    def square(self, number, pause=0.0):
        time.sleep(pause)
        self.say(number)
        return number**2, torch.get_num_threads(), os.getpid()

    def fail(self, number):
        if number == 1:
            raise ValueError(f"number: expected another, got {number}")
        time.sleep(600)

    def die(self):
        os._exit(3)


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_in_the_order_of_the_calls_and_all_reports(jobs):
    heard = []
    with workers(Work, jobs, heard.append) as run:
        found = run(Work.square, [(1, 0.5), (2,), (3,), (4,)])
        again = run(Work.square, [(5,)])
    assert [square for square, _, _ in found + again] == [1, 4, 9, 16, 25]
    assert {threads for _, threads, _ in found} == {1}
    assert sorted(heard) == [1, 2, 3, 4, 5]
    processes = {process for _, _, process in found}
    assert processes == {os.getpid()} if jobs == 1 else os.getpid() not in processes


def test_an_error_arrives_and_ends_the_others():
    began = time.monotonic()
    with pytest.raises(ValueError, match="number: expected another, got 1"), workers(Work, 2, print) as run:
        run(Work.fail, [(1,), (2,)])
    with pytest.raises(RuntimeError, match="terminated abruptly"), workers(Work, 2, print) as run:
        run(Work.die, [()])
    assert time.monotonic() - began < 300
