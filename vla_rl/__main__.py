"""`python -m vla_rl` is `vla-rl`."""

from vla_rl.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
