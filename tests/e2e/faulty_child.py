"""An engine child with faults whose steps take as long as a small model's."""

from __future__ import annotations

import sys

from batching.engine import child
from tests.engine import faulty_child

if __name__ == "__main__":
    faulty_child.STEP_SECONDS = 0.006
    child._build_worker = faulty_child._build_worker
    sys.exit(child.main(int(sys.argv[1])))
