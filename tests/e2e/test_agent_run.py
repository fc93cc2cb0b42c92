"""A stage whose episodes an agent's server drives, NeMo-Gym's way, with a real engine behind the chat endpoint."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import torch
from real_runs import output, run, write_recipe, write_rows, write_world
from transformers import AutoModelForCausalLM

from millrace.data.tokenizer import ChatTokenizer
from millrace.observe.report.rollouts import read_groups
from millrace.observe.writer import read_metrics

PROMPTS = ["say red", "say blue"]
RL = {
    "type": "rl",
    "name": "driven",
    "domains": ["agent"],
    "steps": 1,
    "prompts_per_step": 2,
    "samples_per_prompt": 4,
    "sampling": {"max_response_tokens": 120},
    "optimizer": {"lr": 1.0e-3},
}


def learn_to_be_brief(path: Path) -> None:
    """Teach a checkpoint to end its turns, well enough that it mostly does and says something else each time."""
    tokenizer = ChatTokenizer(path)
    spoken = [("user", "say red"), ("assistant", "red blue"), ("user", "and?"), ("assistant", "blue red")]
    (text,) = tokenizer.render_conversation([{"role": role, "content": said} for role, said in spoken])
    tokens, kept = torch.tensor([text.tokens]), torch.tensor([text.loss_mask])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = model(input_ids=tokens, labels=tokens.masked_fill(~kept, -100)).loss
        if loss.item() < 0.5:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)


@contextmanager
def counting_agent() -> Iterator[str]:
    """Asks three times, the episode named in the request's metadata; the reward is the share of odd letters."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            row = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = row["responses_create_params"]
            messages, text = list(request["input"]), ""
            with httpx.Client(timeout=60, trust_env=False) as http:
                for _ in range(3):
                    asked = {"model": "policy", "messages": messages, "metadata": request["metadata"]}
                    reply = http.post(f"{row['model_server']['base_url']}/chat/completions", json=asked)
                    if reply.status_code == 400:  # at its limit
                        break
                    messages.append(reply.raise_for_status().json()["choices"][0]["message"])
                    text += messages[-1]["content"]
                    messages.append({"role": "user", "content": "and?"})
            content = json.dumps({"reward": sum(ord(letter) % 2 for letter in text) / max(1, len(text))}).encode()
            self.send_response(200 if self.path == "/run" else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_stage_trains_on_the_tokens_of_an_agents_conversations(standing_engine: dict, tmp_path: Path) -> None:
    world = write_world(tmp_path)
    learn_to_be_brief(world / "base")
    rows = [{"responses_create_params": {"input": [{"role": "user", "content": prompt}]}} for prompt in PROMPTS]
    write_rows(world / "train.jsonl", rows)
    write_rows(world / "held_out.jsonl", rows[:1])
    with counting_agent() as url:
        domain = {
            "environment": "agent",
            "train": "train.jsonl",
            "held_out": "held_out.jsonl",
            "agent": {"url": url},
        }
        recipe = write_recipe(
            world,
            "driven",
            stages=[RL],
            domains={"agent": domain},
            fleet=standing_engine,
            evaluation={"samples": 1, "sampling": {"max_response_tokens": 40}},
        )
        assert run(recipe) == 0, output(recipe)
    run_dir = world / "runs" / "driven"
    (metrics,) = [each for each in read_metrics(run_dir / "metrics.jsonl") if each["stage"] == "driven"]
    assert metrics["reward/masked"] == 0 and metrics["grad_norm"] > 0 and metrics["mismatch/mean"] < 1e-4
    assert metrics["episode/turns"] >= 1

    tokenizer = ChatTokenizer(world / "base")
    file = run_dir / "rollouts" / "driven" / "step-000000.jsonl"
    answers = [answer for group in read_groups(file, 1 << 30) for answer, _ in group]
    assert len(answers) == 8 and all(answer["details"] == {"segments": 1.0} for answer in answers)
    for answer in answers:
        assert answer["prompt_tokens"] == tokenizer.render_prompt(answer["messages"])
        for begin, end in answer["given"]:
            text = tokenizer.decode(answer["answer_tokens"][begin:end], skip_special=False)
            assert text.removeprefix("<|im_end|>") == "\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    assert any(len(answer["given"]) == 2 for answer in answers), "some go through all three turns"
