"""A Parquet file with chat messages as data sets have them, for crates/data.

    pip install pyarrow==21.0.0
    python golden/messages_parquet.py crates/data/tests/golden/messages.parquet
"""

import sys

import pyarrow as pa
import pyarrow.parquet as pq

CHATS = [["Hi é", "Yo"], ["One?", "1", "Two?", "2"]]
messages = [[{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(chat)] for chat in CHATS]
pq.write_table(pa.table({"messages": messages, "n": [1, 2]}), sys.argv[1], compression="snappy")
