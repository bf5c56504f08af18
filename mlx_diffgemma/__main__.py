"""`python -m mlx_diffgemma NAME`: the same commands as `mlx_diffgemma NAME`."""

from .cli import main

if __name__ == "__main__":
    main()
