from apis.api import API


class GetUserToken(API):
    database_name = "Account"
    input_parameters = {"username": {"type": "str"}, "password": {"type": "str"}}

    def __init__(self, init_database=None):
        self.database = init_database

    def call(self, username, password):
        print("a tool that talks")

        def work():
            assert self.database[username]["password"] == password, "wrong password"
            return {"token": self.database[username]["token"]}

        return self.wrap({"username": username, "password": password}, work)
