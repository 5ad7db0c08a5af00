"""Reasons for rejecting rows of a log, and records of the rejected rows."""

import enum


class Reason(enum.IntEnum):
    """Reason for rejecting a row; where several apply, the first of them."""

    LISTS_DIFFER = 1
    NO_CANDIDATES = 2
    MISSING_REQUEST = 3
    MISSING_TIME = 4
    MISSING_USER = 5
    MISSING_ITEM = 6
    UNKNOWN_STAGE = 7
    BAD_LABEL = 8
    SEVERAL_HOURS = 9
    SEVERAL_USERS = 10
    DUPLICATE_ITEM = 11
    BEYOND_RETRIEVED = 12


MEANING = {
    Reason.LISTS_DIFFER: "its lists differ in length",
    Reason.NO_CANDIDATES: "its list of items is empty or missing",
    Reason.MISSING_REQUEST: "the request's id is missing or is no id",
    Reason.MISSING_TIME: "the time is missing or is no time",
    Reason.MISSING_USER: "the user's id is missing or is no id",
    Reason.MISSING_ITEM: "the item's id is missing or is no id",
    Reason.UNKNOWN_STAGE: "the stage is missing or is none of data.stages",
    Reason.BAD_LABEL: "a label is neither 0 nor 1",
    Reason.SEVERAL_HOURS: "the rows of its request lie more than an hour apart: one id of two",
    Reason.SEVERAL_USERS: "its request is another user's, by most of its rows",
    Reason.DUPLICATE_ITEM: "the request has the item in a row before, where its positives count",
    Reason.BEYOND_RETRIEVED: "its request has more candidates than funnel.retrieved",
}
