class API:
    def check_api_call_correctness(self, response, groundtruth):
        return (response["output"], response["exception"]) == (groundtruth["output"], groundtruth["exception"])

    def wrap(self, given, work):
        try:
            output, exception = work(), None
        except Exception as e:
            output, exception = None, str(e)
        name = type(self).__name__
        return {"api_name": name, "input": given, "output": output, "exception": exception}
