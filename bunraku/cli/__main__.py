"""`python -m bunraku.cli`, for where the `bunraku` command is not installed."""

from bunraku.cli import main

main()
