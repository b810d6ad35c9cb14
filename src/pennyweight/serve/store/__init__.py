"""What the server must not forget: one writer, and nothing acknowledged before it is on the disk."""

from pennyweight.serve.store.database import Database, SqliteDatabase, Transaction
from pennyweight.serve.store.queries import Store

__all__ = ["Database", "SqliteDatabase", "Store", "Transaction"]
