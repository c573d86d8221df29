"""What varies: texts of system prompts and of formats by language, names of tools and of their arguments.

Source: K2.5, section 4.4, names a module that diversifies prompts; what is in it is our choice.
"""

from collections.abc import Mapping
from typing import Any

SYSTEMS: Mapping[str, tuple[str, ...]] = {
    "en": (
        "You are a helpful assistant.",
        "You are Kimi, an assistant that works step by step and checks what it has done.",
        "Solve the task that you are given. Be brief.",
        "You are an agent. Use the tools that you have wherever they help, and say when you are done.",
    ),
    "de": ("Du bist ein hilfreicher Assistent.", "Löse die gestellte Aufgabe und prüfe dein Ergebnis."),
    "fr": ("Tu es un assistant utile.", "Résous la tâche donnée et vérifie ton résultat."),
    "es": ("Eres un asistente útil.", "Resuelve la tarea y comprueba el resultado."),
    "zh": ("你是一个乐于助人的助手。", "请完成给定的任务，并检查你的结果。"),
}
"""Language -> system prompts."""
BOXED: Mapping[str, str] = {
    "en": "Put your final answer in \\boxed{}.",
    "de": "Schreibe die endgültige Antwort in \\boxed{}.",
    "fr": "Écris la réponse finale dans \\boxed{}.",
    "es": "Escribe la respuesta final en \\boxed{}.",
    "zh": "请把最终答案写在 \\boxed{} 中。",
}
"""Language -> asks for a final answer in a box."""
LAST_LINE: Mapping[str, str] = {
    "en": "End with a line of the form `Answer: …`.",
    "de": "Beende die Antwort mit einer Zeile der Form `Answer: …`.",
    "fr": "Termine par une ligne de la forme `Answer: …`.",
    "es": "Termina con una línea de la forma `Answer: …`.",
    "zh": "最后一行请写成 `Answer: …` 的形式。",
}
"""Language -> asks for a final answer in a line of its own."""
ANSWERED = ("answer", "number", "text", "choice", "count")
"""Judges that read a final answer, in whichever of these formats."""
TOOLS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "python": (
        {"name": "run_python", "arguments": {"code": "source"}},
        {"name": "ipython", "arguments": {"code": "cell"}},
        {"name": "execute_code", "description": "Execute Python code in a notebook that keeps its state."},
    ),
    "shell": (
        {"name": "bash", "arguments": {"command": "cmd"}},
        {"name": "run_command", "description": "Run a command in a terminal."},
        {"name": "terminal", "arguments": {"command": "input"}},
    ),
    "read_file": (
        {"name": "view", "arguments": {"path": "file"}},
        {"name": "open_file", "arguments": {"path": "file_path"}},
    ),
    "write_file": ({"name": "create_file", "arguments": {"path": "file_path", "content": "text"}},),
    "edit_file": (
        {"name": "str_replace", "arguments": {"old": "old_str", "new": "new_str"}},
        {"name": "replace_in_file"},
    ),
    "list_files": ({"name": "ls"}, {"name": "list_directory", "arguments": {"path": "folder"}}),
    "search": (
        {"name": "find_documents", "arguments": {"query": "words"}},
        {"name": "lookup", "arguments": {"query": "q", "k": "count"}},
    ),
    "open_document": ({"name": "read_document", "arguments": {"id": "number"}}, {"name": "fetch"}),
    "open_page": ({"name": "visit", "arguments": {"page": "path"}},),
    "look_at_page": ({"name": "screenshot", "arguments": {"page": "path"}},),
}
"""Tool -> what it may be called instead, with other arguments or descriptions."""
