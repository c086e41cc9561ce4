"""Any served vision-language model on any env, without training:

    python baselines/zero_shot_vlm.py --base-url http://127.0.0.1:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct

It plays by the chosen protocol with its own horizon, beside the oracle (the tool's ceiling) and one box (what
takes no model), and writes episodes, summary and a report in which every answer stands beside its picture. The same
command goes on after a stop. The key, where the server wants one, is read from $OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse

from medseg_gym.bench.evaluate import evaluate
from medseg_gym.cli import print_summary
from medseg_gym.cli_terminal import clean_errors, progress_bars
from medseg_gym.policies import protocols
from medseg_gym.policies.vlm import served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True, help="an OpenAI-compatible server, http://HOST:PORT/v1")
    parser.add_argument("--model", required=True, help="the name it serves the model by")
    parser.add_argument("--env", default="MedSeg-Phantom-Nano-v0")
    parser.add_argument("--protocol", default="medsam-agent", choices=sorted(protocols.PROTOCOLS))
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--num-envs", type=int, default=16, help="episodes, and so requests, under way at once")
    parser.add_argument("--alone", action="store_true", help="without the scripted policies beside it")
    parser.add_argument("--out", default="runs/zero-shot-vlm")
    args = parser.parse_args()

    with clean_errors(), progress_bars() as progress:
        protocol = protocols.make(args.protocol)
        agent = served(
            args.model,
            args.base_url,
            args.protocol,
            temperature=args.temperature,
            max_tokens=args.max_tokens,
            concurrency=args.num_envs,
        )
        others = [] if args.alone else ["BoxOnce", "OracleClicks"]
        if "box" not in protocol.verbs:
            others = [name for name in others if name != "BoxOnce"]
        result = evaluate(
            args.env,
            [agent, *others],
            out=args.out,
            cases=args.cases,
            seed=args.seed,
            num_envs=args.num_envs,
            verbs=protocol.verbs,
            progress=progress,
            **protocol.settings,
        )
    print_summary(result.summary)
    print(f"report: {result.report}")


if __name__ == "__main__":
    main()
