"""`python -m dist_adv`, which is what `accelerate launch -m` and `torchrun -m` run."""

from dist_adv.cli import main

if __name__ == "__main__":
    main()
