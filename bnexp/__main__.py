from bnexp.cli import command

if __name__ == "__main__":
    command()
