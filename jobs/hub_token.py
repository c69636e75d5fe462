"""Print a secret parameter of AWS Systems Manager, such as the hub's token, or nothing where this node may not read one.

python jobs/hub_token.py NAME; for the environment of a process, so that the secret stands in no file and no command line.
"""

import sys

__all__ = ["main"]


def main(name: str) -> str:
    """Return the parameter's value; empty, with a line on stderr, where it is not there or may not be read."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        answer = boto3.client("ssm").get_parameter(Name=name, WithDecryption=True)
    except (BotoCoreError, ClientError) as error:
        sys.stderr.write(f"{name} was not read ({type(error).__name__}): gated models cannot be fetched here\n")
        return ""
    return str(answer["Parameter"]["Value"])


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1]) + "\n")
