from deploykit.cli import main

main(prog_name="deploykit")
