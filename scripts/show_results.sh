#!/usr/bin/env bash
# Shows id, question and answer (or why there is none) of each line of a results file, with sed alone.
set -euo pipefail
text='"(([^"\\]|\\.)*)"'
sed -E \
    -e "s/^\{\"id\":$text,\"query\":$text.*\"answer\":null,.*\"error\":$text.*\$/\n\1\n  Q: \3\n  failed: \5/" \
    -e "s/^\{\"id\":$text,\"query\":$text.*\"answer\":$text,\"retrieval_time\".*\$/\n\1\n  Q: \3\n  A: \5/" \
    "${1:?usage: $0 RESULTS.jsonl}"
