"""Imported by the server that forks the processes of `tests.killed`: what is slow the first time."""

import io

import matplotlib.pyplot as plt
import pandas as pd

from foster_lib.encoder import TextEncoder
from foster_lib.tables import use_style
from tests import killed  # noqa: F401

TextEncoder.load("tiny")
use_style()
figure, axis = plt.subplots(layout="constrained")
axis.set_xlabel("warm")
figure.savefig(io.BytesIO(), format="png")
plt.close(figure)
pd.read_parquet(io.BytesIO(pd.DataFrame({"a": ["b"]}).to_parquet()))
