import time

from apis.api import API


class Calculator(API):
    input_parameters = {"formula": {"type": "str"}}

    def call(self, formula):
        if formula == "forever":
            time.sleep(60)
        if formula == "die":
            import os

            os._exit(3)
        return self.wrap({"formula": formula}, lambda: sum(map(int, formula.split("+"))))
