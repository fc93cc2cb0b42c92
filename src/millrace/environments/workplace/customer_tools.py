"""Customers and leads (CRM)."""

from __future__ import annotations

from typing import Any

from millrace.environments.workplace.tables import CUSTOMER_COLUMNS, Office
from millrace.environments.workplace.tool import ToolFailed, holds, one_of, page_of, row_of, tool, within

STATUSES = ("Qualified", "Won", "Lost", "Lead", "Proposal")
PRODUCTS = ("Software", "Hardware", "Services", "Consulting", "Training")
CHANGEABLE = CUSTOMER_COLUMNS[1:]
ADDRESSES = ("assigned_to_email", "customer_email")


@tool(
    "customer_relationship_manager_search_customers",
    "Searches the customers that fit everything that is given.",
    customer_name="Text in the customer's name",
    customer_email="Text in the customer's address",
    product_interest=f"The product: {', '.join(PRODUCTS)}",
    status=f"The status: {', '.join(STATUSES)}",
    assigned_to_email="Text in the address of whoever looks after the customer",
    last_contact_date_min="Last contact at this time or later, YYYY-MM-DD",
    last_contact_date_max="Last contact at this time or earlier, YYYY-MM-DD",
    follow_up_by_min="Follow-up at this time or later, YYYY-MM-DD",
    follow_up_by_max="Follow-up at this time or earlier, YYYY-MM-DD",
    page="Which page of the result",
    page_size="Customers on a page",
)
def search_customers(
    office: Office,
    customer_name: str | None = None,
    customer_email: str | None = None,
    product_interest: str | None = None,
    status: str | None = None,
    assigned_to_email: str | None = None,
    last_contact_date_min: str | None = None,
    last_contact_date_max: str | None = None,
    follow_up_by_min: str | None = None,
    follow_up_by_max: str | None = None,
    page: int = 1,
    page_size: int = 5,
) -> Any:
    texts = {"customer_name": customer_name, "customer_email": customer_email, "product_interest": product_interest}
    texts |= {"status": status, "assigned_to_email": assigned_to_email}
    bounds = {
        "last_contact_date": (last_contact_date_min, last_contact_date_max),
        "follow_up_by": (follow_up_by_min, follow_up_by_max),
    }
    if not any(texts.values()) and not any(map(any, bounds.values())):
        raise ToolFailed("say what the customers must have; nothing was given")
    found = [
        row
        for row in office.customers
        if all(holds(row[column], text) for column, text in texts.items())
        and all(within(row[column], *limits) for column, limits in bounds.items())
    ]
    return page_of("customers", found, page, page_size)


@tool(
    "customer_relationship_manager_update_customer",
    "Changes one field of a customer.",
    customer_id="The customer's id",
    field=f"The field: {', '.join(CHANGEABLE)}",
    new_value="What it is to be",
)
def update_customer(office: Office, customer_id: str, field: str, new_value: str) -> str:
    one_of("field", field, CHANGEABLE)
    if field == "status":
        one_of(field, new_value, STATUSES)
    if field == "product_interest":
        one_of(field, new_value, PRODUCTS)
    row_of(office.customers, customer_id, "customer")
    office.customers.change(customer_id, field, new_value.lower() if field in ADDRESSES else new_value)
    return "The customer was changed."


@tool(
    "customer_relationship_manager_add_customer",
    "Adds a customer and returns the new id.",
    customer_name="Name of the customer",
    assigned_to_email="Address of whoever looks after the customer",
    status=f"The status: {', '.join(STATUSES)}",
    customer_email="Address of the customer",
    customer_phone="Phone number of the customer",
    last_contact_date="When there was contact last, YYYY-MM-DD",
    product_interest=f"The product: {', '.join(PRODUCTS)}",
    notes="Notes about the customer",
    follow_up_by="When to follow up, YYYY-MM-DD",
)
def add_customer(
    office: Office,
    customer_name: str,
    assigned_to_email: str,
    status: str,
    customer_email: str | None = None,
    customer_phone: str | None = None,
    last_contact_date: str | None = None,
    product_interest: str | None = None,
    notes: str | None = None,
    follow_up_by: str | None = None,
) -> str:
    """Status and product are taken as they are given, as NeMo-Gym does; a wrong one is a wrong final table."""
    return office.customers.add(
        {
            "customer_name": customer_name,
            "assigned_to_email": assigned_to_email.lower(),
            "status": status,
            "customer_email": customer_email.lower() if customer_email else None,
            "customer_phone": customer_phone,
            "last_contact_date": last_contact_date,
            "product_interest": product_interest,
            "notes": notes,
            "follow_up_by": follow_up_by,
        }
    )


@tool("customer_relationship_manager_delete_customer", "Deletes a customer.", customer_id="The customer's id")
def delete_customer(office: Office, customer_id: str) -> str:
    row_of(office.customers, customer_id, "customer")
    office.customers.remove(customer_id)
    return "The customer was deleted."
