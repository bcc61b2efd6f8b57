"""Sessions: opened once, ended once."""

from __future__ import annotations

from snowskin.kvstore.session import DEFAULT_TENANT, SessionTable


def test_session_is_known_until_it_ends():
    table = SessionTable()
    session = table.open("decode-0", maps_memory=True, may_write=False)
    assert (session.client_name, session.tenant) == ("decode-0", DEFAULT_TENANT)
    assert (session.maps_memory, session.may_write) == (True, False)
    assert table.get(session.id) is session
    assert (len(table), list(table)) == (1, [session])
    assert table.end(session.id) is session
    assert (table.get(session.id), table.end(session.id), len(table)) == (None, None, 0)


def test_ids_of_ended_sessions_do_not_come_back():
    table = SessionTable()
    ids = []
    for _ in range(3):
        session = table.open("c", maps_memory=False, may_write=True)
        table.end(session.id)
        ids.append(session.id)
    assert len(set(ids)) == 3
