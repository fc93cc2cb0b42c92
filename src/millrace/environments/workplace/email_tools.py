"""The directory of addresses, and the mailbox."""

from __future__ import annotations

from typing import Any

from millrace.environments.workplace.tables import EMAIL_COLUMNS, Office, Row
from millrace.environments.workplace.tool import ToolFailed, address, holds, moment, one_of, page_of, row_of, tool

NOW = "2023-11-30 23:59:00"
"""The present moment in every office: when an email is sent."""

COLUMNS = ", ".join(EMAIL_COLUMNS)


@tool(
    "company_directory_find_email_address",
    "Looks up the addresses of colleagues by name.",
    name="A name or a part of one; capitals make no difference",
)
def find_email_address(office: Office, name: str) -> list[str]:
    return [each for each in office.addresses if holds(each, name)]


@tool(
    "email_get_email_information_by_id",
    "Reads one field of an email.",
    email_id="The email's id",
    field=f"The field: {COLUMNS}",
)
def get_email(office: Office, email_id: str, field: str) -> dict[str, Any]:
    row = row_of(office.emails, email_id, "email")
    return {field: row[one_of("field", field, EMAIL_COLUMNS)]}


@tool(
    "email_search_emails",
    "Searches the mailbox for emails that have every given word in subject, body or address; the newest come first.",
    query="The words; all emails when left out",
    date_min="First day on which it was sent, YYYY-MM-DD",
    date_max="Last day on which it was sent, YYYY-MM-DD",
    page="Which page of the result",
    page_size="Emails on a page",
)
def search_emails(
    office: Office,
    query: str = "",
    date_min: str | None = None,
    date_max: str | None = None,
    page: int = 1,
    page_size: int = 5,
) -> Any:
    first = moment("date_min", date_min).date() if date_min else None
    last = moment("date_max", date_max).date() if date_max else None
    words = query.lower().split()

    def wanted(row: Row) -> bool:
        text = f"{row['subject']} {row['body']} {row['sender/recipient']}".lower()
        day = moment("sent_datetime", str(row["sent_datetime"])).date()
        in_time = (first is None or day >= first) and (last is None or day <= last)
        return in_time and all(word in text for word in words)

    found = [row for row in office.emails if wanted(row)]
    found.sort(key=lambda row: str(row["sent_datetime"]), reverse=True)
    return page_of("emails", found, page, page_size)


@tool(
    "email_send_email",
    "Sends an email.",
    recipient="Address of the recipient",
    subject="Subject line",
    body="Text of the email",
)
def send_email(office: Office, recipient: str, subject: str, body: str) -> str:
    _send(office, recipient, subject, body)
    return "The email was sent."


@tool("email_delete_email", "Deletes an email.", email_id="The email's id")
def delete_email(office: Office, email_id: str) -> str:
    row_of(office.emails, email_id, "email")
    office.emails.remove(email_id)
    return "The email was deleted."


@tool(
    "email_forward_email",
    "Forwards an email.",
    email_id="The email's id",
    recipient="Address to which it is forwarded",
)
def forward_email(office: Office, email_id: str, recipient: str) -> str:
    row = row_of(office.emails, email_id, "email")
    _send(office, recipient, f"FW: {row['subject']}", row["body"])
    return "The email was forwarded."


@tool(
    "email_reply_email",
    "Answers an email.",
    email_id="The email's id",
    body="Text of the answer",
)
def reply_email(office: Office, email_id: str, body: str) -> str:
    row = row_of(office.emails, email_id, "email")
    _send(office, str(row["sender/recipient"]), f"RE: {row['subject']}", body)
    return "The answer was sent."


def _send(office: Office, recipient: str, subject: str, body: str | None) -> None:
    if not body:
        raise ToolFailed("the email has no text that could be sent")
    office.emails.add(
        {
            "inbox/outbox": "outbox",
            "sender/recipient": address("recipient", recipient),
            "subject": subject,
            "sent_datetime": NOW,
            "body": body,
        }
    )
