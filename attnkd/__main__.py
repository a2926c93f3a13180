import sys

from attnkd.commands.cli import main

sys.exit(main())
