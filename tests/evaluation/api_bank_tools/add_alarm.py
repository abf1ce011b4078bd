from apis.api import API


class AddAlarm(API):
    database_name = "Alarm"
    input_parameters = {"token": {"type": "str"}, "time": {"type": "str"}, "rings": {"type": "int"}}

    def __init__(self, init_database=None, token_checker=None):
        self.database, self.checker = init_database, token_checker

    def call(self, token, time, rings):

        def work():
            user = self.checker.check_token(token)
            assert isinstance(rings, int) and len(self.database) == 1, "not a fresh database"
            self.database["2"] = {"time": time, "rings": rings, "username": user}
            return "success"

        return self.wrap({"token": token, "time": time}, work)
