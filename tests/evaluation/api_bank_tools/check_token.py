from apis.api import API


class CheckToken(API):
    database_name = "Account"
    input_parameters = {"token": {"type": "str"}}

    def __init__(self, init_database=None):
        self.database = init_database

    def check_token(self, token):
        for name, entry in self.database.items():
            if entry["token"] == token:
                return name
        raise Exception("The token is invalid.")
