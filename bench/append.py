"""How many appends a second does one server answer, each durable, of 100 bytes of content?

1, 8 and 50 clients, each with a connection of its own and one append under way. They are this
process, in one selector's loop. Floor: bare SQLite, one row and one commit (fsync) each.
"""

from __future__ import annotations

from _measure import (
    CONTENT,
    Client,
    Crowd,
    Floor,
    Report,
    alternate,
    at_least,
    folder,
    pick,
    rate_of_one,
    request,
    server,
)
from _plot import Plot

GOALS = {1: 0.6, 8: 1.6, 50: 3.0}
ROUNDS = pick(7, 3)
SECONDS = pick(0.7, 0.2)


def main() -> None:
    report = Report("append", "Durable appends a second, 100 bytes each, over the Unix socket")
    with folder() as where, server(f"{where}/store") as running:
        floor = Floor(where)
        ratios: dict[str, list[tuple[float, float]]] = {}
        for topic in ("events", "app.events"):
            data = request("POST", f"/append/{topic}", CONTENT)
            for clients, goal in GOALS.items():
                if clients == 1:
                    one = Client(running.socket_path)
                    found = alternate(
                        ROUNDS,
                        lambda one=one, data=data: rate_of_one(one, data, SECONDS),
                        lambda: floor.commit_rate(SECONDS),
                    )
                    one.close()
                else:
                    crowd = Crowd(running.socket_path, clients)
                    found = alternate(
                        ROUNDS,
                        lambda crowd=crowd, data=data: crowd.rate(data, SECONDS),
                        lambda: floor.commit_rate(SECONDS),
                    )
                    crowd.close()
                ratios.setdefault(topic, []).append((clients, found.ratio))
                report.add(
                    f"{clients} clients, topic {topic}" if clients > 1 else f"1 client, {topic}",
                    found.subject,
                    "appends/s",
                    at_least(found.ratio, goal),
                    floor=found.floor,
                    floor_unit="commits/s, bare SQLite",
                    ratio=found.ratio,
                )
        floor.close()
    title = "Durable appends, in commits of bare SQLite"
    report.plot("append", Plot(title, "clients", "appends for each bare commit", ratios))
    report.end()


if __name__ == "__main__":
    main()
