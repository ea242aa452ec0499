"""Offers visitors of the page for a soak test: well-behaved, malformed, slow, and gone before the
end.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from support.soak import Behaviour
from support.web_client import HttpVisitor, aborted_visit, bad_visit, good_visit, slow_visit
from support.web_visitor import make_weights, serving


@contextlib.contextmanager
def page_in_soak(_assets: Path, folder: Path) -> Iterator[tuple[int, list[Behaviour]]]:
    """A running page: its process id, and what its visitors do."""
    make_weights(folder)
    with serving(folder, "--max_new_tokens", 1, "--concurrency", 4, cold=True, SHORT="1") as site:
        inside = HttpVisitor(site)  # guessed passwords make others at this address wait for theirs
        yield (
            site.pid,
            [
                Behaviour("good", lambda rng: good_visit(site, inside), 6),
                Behaviour("slow", lambda rng: slow_visit(site, inside)),
                Behaviour("bad", lambda rng: bad_visit(site, inside, rng), 3),
                Behaviour("aborted", lambda rng: aborted_visit(site, inside), 2),
            ],
        )
