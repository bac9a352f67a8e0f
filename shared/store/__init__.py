"""Where keys, counters and records live: SQLite on a laptop, DynamoDB on AWS, behind one contract."""

from __future__ import annotations

from shared.store.base import Store


def open_store(database_url: str, table_name: str | None) -> Store:
    """The store that the settings name, `table_name` before the URL; nothing is opened until it is first asked.

    Raises ValueError, which says what is accepted.
    """
    if table_name or database_url.startswith("dynamodb://"):
        from shared.store.dynamodb import DynamoStore, address  # boto3 is heavy: only where it is used

        return DynamoStore(table_name) if table_name else DynamoStore(*address(database_url))
    path = database_url.removeprefix("sqlite:///")
    if path in ("", "/", database_url):
        raise ValueError(
            "DATABASE_URL must be sqlite:///relative.db, sqlite:////absolute/path.db"
            " or dynamodb://table?region=…&endpoint=…"
        )
    from shared.store.sqlite import SQLiteStore

    return SQLiteStore(path)
