"""RunPod's Hub looks for a file of this name. It starts what the image's entrypoint starts: the queue's worker."""

from supervisor.cli import main

if __name__ == "__main__":
    main(["up", "--mode", "queue"])
