#!/usr/bin/env bash
# Shows the id, question and answer of each line of a results file. Needs nothing but sed.
set -euo pipefail
sed -E 's/^\{"id":"(([^"\\]|\\.)*)","query":"(([^"\\]|\\.)*)".*"answer":("(([^"\\]|\\.)*)"|null),"retrieval_time".*$/\n\1\n  Q: \3\n  A: \6/' "${1:?usage: $0 RESULTS.jsonl}"
