"""The experiment of Kimanius et al. 2021 again: RELION's MAP against RED and CW-RED, judged against the truth."""
