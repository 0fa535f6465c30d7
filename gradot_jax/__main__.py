"""`python -m gradot_jax` is the `gradot` program."""

from gradot_jax.cli.main import program

if __name__ == "__main__":
    program()
