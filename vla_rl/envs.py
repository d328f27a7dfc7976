"""From any Gymnasium environment to the observation convention, and from images to an encoder's features."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from vla_rl._cameras import camera_names
from vla_rl._observation import (
    check_range,
    first_and_last,
    height_and_width,
    is_image,
    is_picture,
    part_at,
    parts_of,
    rgb_image,
    state_space,
    whole_numbers,
)

if TYPE_CHECKING:
    from vla_rl.encoders.features import Features
    from vla_rl.encoders.vlm import FrozenVLMEncoder


class VLAObservation(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Make any environment follow the observation convention.

    The observation becomes ``Dict(image: uint8 [H, W, 3], state: float32 [S], task_id: int64)`` (``image_<camera>``
    instead of ``image`` for several cameras; no ``state`` where the environment has none), ``instructions`` is the
    table that ``task_id`` points into, and ``info["success"]`` is a bool after ``reset`` (False) and every ``step``.
    ``info["instruction"]`` is the instruction after ``reset``. A key of a Dict within a Dict is written
    ``"arm/joints"``.

    Example:
        >>> import gymnasium as gym
        >>> env = gym.make("MountainCarContinuous-v0", render_mode="rgb_array")  # doctest: +SKIP
        >>> env = VLAObservation(  # doctest: +SKIP
        ...     env,
        ...     instructions=["drive up the hill"],
        ...     success_key=lambda observation, reward, terminated, truncated, info: terminated,
        ...     image_size=64,
        ... )
    """

    def __init__(
        self,
        env: gym.Env,
        *,
        instructions: Sequence[str] | None = None,
        task_id: int | None = None,
        instruction_key: str | None = None,
        image_key: str | Sequence[str] | None = None,
        state_key: str | Sequence[str] | None = None,
        state_indices: Sequence[int] | None = None,
        success_key: str | Callable[..., Any] | None = "success",
        image_size: int | tuple[int, int] | None = None,
        use_state: bool = True,
    ) -> None:
        """Wrap one environment; only a rendered image without ``image_size`` makes it reset and render once, here.

        Args:
            env: any environment with a Box, Discrete, ... or Dict observation.
            instructions: the table of instructions; None takes the environment's own ``instructions``.
            task_id: index into the table; None takes ``task_id`` of a Dict observation that has one, or the only
                sentence of a table of one.
            instruction_key: key of the reset's info, or of the observation, that holds the episode's instruction: a
                sentence of the table, or its index.
            image_key: key of a Dict observation with the image, or several keys (``image`` stays, others become
                ``image_<key>``), or ``"render()"``. None takes ``image`` or all ``image_<camera>`` of a Dict or else
                the only image in it, an observation that is itself an image, or else ``env.render()``. Images may be
                uint8 or float between the bounds of their space, [H, W], [H, W, C] or [C, H, W], grey, RGB or RGBA.
            state_key: key(s) of a Dict observation, flattened and concatenated into the state; None takes ``state`` of
                a Dict that has one, or an observation that is neither Dict nor image.
            state_indices: which numbers of that state to keep, for example ``range(27)`` to keep the robot's own
                joints and leave out where the objects are; None keeps all.
            success_key: key of ``info``; or a function of ``(observation, reward, terminated, truncated, info)``, the
                five things that ``env.step`` returned; or None where there is no success (always False).
            image_size: side length or (height, width) in pixels that images are scaled to, by area averaging. Give it
                for rendered images in ``AsyncVectorEnv``, which constructs one environment before it forks: an OpenGL
                context does not survive that.
            use_state: False leaves the state out.

        Raises:
            ValueError: if there are no instructions, an unknown task_id, no image, two images of one name, or a mask.
        """
        self._size = image_size = height_and_width(image_size)
        state_indices = whole_numbers(state_indices)
        gym.utils.RecordConstructorArgs.__init__(
            self,
            instructions=instructions,
            task_id=task_id,
            instruction_key=instruction_key,
            image_key=image_key,
            state_key=state_key,
            state_indices=state_indices,
            success_key=success_key,
            image_size=image_size,
            use_state=use_state,
        )
        gym.Wrapper.__init__(self, env)
        if instructions is None and env.has_wrapper_attr("instructions"):
            instructions = env.get_wrapper_attr("instructions")
        if not instructions or isinstance(instructions, str) or not all(isinstance(text, str) for text in instructions):
            raise ValueError(f"VLAObservation got instructions={instructions!r}; give a list of one string per task.")
        if task_id is not None and instruction_key is not None:
            raise ValueError(f"task_id={task_id} and instruction_key={instruction_key!r} both choose; give one.")
        self.instructions: tuple[str, ...] = tuple(instructions)
        self.success_key = success_key
        self._instruction_key = instruction_key

        parts = parts_of(env.observation_space)
        chosen = task_id is not None or instruction_key is not None
        own_task_id = not chosen and "task_id" in parts
        if len(self.instructions) > 1 and not chosen and not own_task_id:
            raise ValueError(f"which of {self.instructions} is this environment's? Give task_id or instruction_key.")
        self._task_id = None if own_task_id else int(task_id or 0)
        instructions_for(self.instructions, first_and_last(parts["task_id"]) if own_task_id else [self._task_id])
        self._image_keys = self._find_images(parts, image_key)
        boxes = {key: part_at(env.observation_space, key) for key in self._image_keys.values() if key is not None}
        self._bounds = {key: (float(box.low.min()), float(box.high.max())) for key, box in boxes.items()}
        self._state_parts = self._find_state(parts, state_key) if use_state else None
        self._state_indices = state_indices

        space: dict[str, gym.Space] = {}
        for name, key in self._image_keys.items():
            height, width = self._size or self._image_shape(key)[:2]
            space[name] = spaces.Box(0, 255, (height, width, 3), np.uint8)
        if self._state_parts is not None:
            space["state"] = state_space(list(self._state_parts.values()), state_indices)
        elif state_indices is not None:
            raise ValueError(f"state_indices={state_indices}, but there is no state; give state_key={sorted(parts)}.")
        space["task_id"] = spaces.Discrete(len(self.instructions))
        self.observation_space = spaces.Dict(space)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict[str, Any]]:
        """Reset the environment; adds ``success`` (False) and ``instruction`` to the info.

        Raises:
            KeyError: if ``instruction_key`` is a key neither of the info nor of the observation.
            TypeError: if the environment's ``reset`` returned no info.
            ValueError: if the instruction found there is not in the table.
        """
        observation, info = self.env.reset(seed=seed, options=options)
        if not isinstance(info, dict):
            raise TypeError(
                f"reset of {self.env.unwrapped} gave no (observation, info dict); update it to Gymnasium's API"
            )
        if self._instruction_key is not None:
            self._task_id = self._find_instruction(observation, info)
        converted = self.observation(observation)
        instruction = instructions_for(self.instructions, converted["task_id"])[0]
        return converted, {**info, "success": False, "instruction": instruction}

    def step(self, action: Any) -> tuple[dict, Any, bool, bool, dict[str, Any]]:
        """Step the environment; adds ``success`` to the info.

        Raises:
            KeyError: if ``success_key`` is not a key of the info.
            ValueError: if it is a function that returned something else than True or False.
        """
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self.success_key is None:
            success = False
        elif callable(self.success_key):
            success = self.success_key(observation, reward, terminated, truncated, info)
            if success is None or np.size(success) != 1:
                raise ValueError(f"success_key's function returned {success!r}; it has to return True or False.")
        elif self.success_key in info:
            success = info[self.success_key]
        else:
            raise KeyError(
                f"the environment's info has no {self.success_key!r}, only {sorted(info)}; give as "
                "success_key one of these, a function of (observation, reward, terminated, truncated, info), or None."
            )
        return self.observation(observation), reward, terminated, truncated, {**info, "success": bool(success)}

    def observation(self, observation: Any) -> dict[str, Any]:
        """Convert one observation of the wrapped environment."""
        converted: dict[str, Any] = {}
        for name, key in self._image_keys.items():
            image = self._raw_image(observation, key)
            converted[name] = image if self._size in (None, image.shape[:2]) else resize_area(image, self._size)
        if self._state_parts is not None:
            values = [(part, part_at(observation, key)) for key, part in self._state_parts.items()]
            flat = [np.asarray(spaces.flatten(part, value), np.float32).ravel() for part, value in values]
            state = np.concatenate(flat)
            converted["state"] = state if self._state_indices is None else state[self._state_indices]
        task_id = observation["task_id"] if self._task_id is None else self._task_id
        return converted | {"task_id": int(np.asarray(task_id).item())}

    def _find_images(self, parts: dict[str, gym.Space], image_key: str | Sequence[str] | None) -> dict[str, str | None]:
        """Output name -> path in the Dict; "" stands for the observation itself and None for ``env.render()``."""
        if image_key is None:
            if is_picture(self.env.observation_space):
                return {"image": ""}
            pictures = [key for key, part in parts.items() if is_picture(part)]
            if "image" in parts:
                image_key = "image"
            elif any(key.startswith("image_") for key in parts):
                image_key = [key for key in parts if key.startswith("image_")]
            elif len(pictures) > 1:
                raise ValueError(f"the observation has the images {pictures}; say by image_key which to take.")
            elif pictures:
                image_key = pictures[0]
        if image_key is not None and image_key != "render()":
            cameras = {"image": image_key} if isinstance(image_key, str) else camera_names(image_key, "image_key")
            for key in list(cameras.values()) or [str(image_key)]:
                if key not in parts or not is_image(parts[key]):
                    raise ValueError(
                        f"image_key {key!r} is {parts.get(key)} in the observation with keys {sorted(parts)}; give the "
                        "key of a Box [H, W, 3], uint8 or with finite bounds, or 'render()'."
                    )
            return dict(cameras)
        if self.env.render_mode != "rgb_array":
            raise ValueError(
                f"the image has to come from env.render(), but render_mode is {self.env.render_mode!r}; make the "
                "environment with render_mode='rgb_array' or give image_key."
            )
        return {"image": None}

    def _find_state(
        self, parts: dict[str, gym.Space], state_key: str | Sequence[str] | None
    ) -> dict[str, gym.Space] | None:
        """Path -> space of what makes the state; "" stands for the observation itself and None for no state."""
        space = self.env.observation_space
        if state_key is None:
            if isinstance(space, spaces.Dict):
                return {"state": parts["state"]} if "state" in parts else None
            return None if is_picture(space) else {"": space}
        keys = [state_key] if isinstance(state_key, str) else list(state_key)
        for key in keys:
            if key not in parts:
                raise ValueError(
                    f"state_key {key!r} is not in the observation with keys {sorted(parts)}; give one of these."
                )
        return {key: parts[key] for key in keys}

    def _find_instruction(self, observation: Any, info: dict[str, Any]) -> int:
        key = self._instruction_key
        if key in info:
            found = np.asarray(info[key]).item()
        elif key in parts_of(self.env.observation_space):
            found = np.asarray(part_at(observation, key)).item()
        else:
            raise KeyError(
                f"instruction_key {key!r} is in neither the reset's info, with {sorted(info)}, nor the observation; "
                "give a key of one of them."
            )
        if found in self.instructions:
            return self.instructions.index(found)
        if isinstance(found, int) and 0 <= found < len(self.instructions):
            return found
        raise ValueError(
            f"the environment's {key!r} is {found!r}, which is not in the table of {len(self.instructions)} "
            "instructions; give VLAObservation instructions=[...] with every sentence that can occur."
        )

    def _image_shape(self, key: str | None) -> tuple[int, ...]:
        if key is None:
            self.env.reset()
            return self._raw_image(None, None).shape
        return rgb_image(np.zeros(part_at(self.env.observation_space, key).shape, np.uint8)).shape

    def _raw_image(self, observation: Any, key: str | None) -> np.ndarray:
        if key is None:
            image = np.asarray(self.env.render())
            if image.dtype != np.uint8 or image.ndim not in (2, 3):
                raise ValueError(f"env.render() gave {image.dtype} {image.shape}; it has to give uint8 [H, W, 3].")
            return rgb_image(image)
        low, high = self._bounds[key]
        image = np.asarray(part_at(observation, key))
        if image.dtype != np.uint8:
            check_range(image, low, high)
        return rgb_image(image, low=low, high=high)


class FrameHistory(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """Show the last frames beside the newest one, as views: ``image`` becomes ``image_t0`` (oldest), ``image_t1``, ...

    ``image_front`` becomes ``image_front_t0`` and so on. At the start of an episode its first frame stands for those
    that there are none of. Wrap each sub-environment, inside the vector environment, so that every reset begins anew.
    """

    def __init__(self, env: gym.Env, length: int) -> None:
        """Wrap one environment of the observation convention.

        Args:
            env: gives ``image`` or ``image_<camera>``.
            length: frames to show, the newest included.

        Raises:
            ValueError: if there is no image, or fewer than two frames are asked for.
        """
        gym.utils.RecordConstructorArgs.__init__(self, length=length)
        gym.ObservationWrapper.__init__(self, env)
        parts = env.observation_space.spaces if isinstance(env.observation_space, spaces.Dict) else {}
        names = [name for name in parts if name == "image" or name.startswith("image_")]
        if not names or length < 2:
            raise ValueError(
                f"FrameHistory got length={length} and observations with the keys {sorted(parts)}; give a length of 2 "
                "or more, and an env with an image, as VLAObservation gives it."
            )
        self._keys = {name: [f"{name}_t{i:0{len(str(length - 1))}}" for i in range(length)] for name in names}
        self._frames: dict[str, deque[np.ndarray]] = {name: deque(maxlen=length) for name in names}
        views = {key: parts[name] for name, keys in self._keys.items() for key in keys}
        self.observation_space = spaces.Dict({**views, **{k: part for k, part in parts.items() if k not in names}})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict[str, Any]]:
        """Reset the environment and forget the frames of the episode before."""
        for frames in self._frames.values():
            frames.clear()
        return super().reset(seed=seed, options=options)

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The observation with its frames and those before them, oldest first."""
        views: dict[str, Any] = {}
        for name, frames in self._frames.items():
            frames.append(np.array(observation[name]))
            missing = [frames[0]] * (len(self._keys[name]) - len(frames))
            views |= {key: frame.copy() for key, frame in zip(self._keys[name], [*missing, *frames], strict=True)}
        return {**views, **{key: value for key, value in observation.items() if key not in self._frames}}


class EncodeObservation(VectorWrapper):
    """Replace the images of a vector environment by a frozen encoder's features, for any RL library to train on.

    The observation becomes ``Dict(tokens: float32 [N, M, D], mask: int8 [N, M] (1 = real token), state, task_id)``,
    with one M for the whole table of instructions. Every observation is encoded exactly once: one batch per step, with
    the final observations of ``SAME_STEP`` in the same batch, and only the rows that a partial ``reset`` has reset.
    """

    def __init__(self, env: VectorEnv, encoder: FrozenVLMEncoder, *, max_tokens: int | None = None) -> None:
        """Wrap a vector environment whose observation follows the convention.

        Args:
            env: vector environment with ``image`` (or ``image_<camera>``) and ``task_id``, and a table of instructions.
            encoder: has ``encode(images, instructions) -> Features``, ``feature_dim`` and ``fingerprint``.
            max_tokens: M; None finds it by encoding every instruction of the table once with a black image.

        Raises:
            ValueError: if the observation has no image or task_id.
        """
        super().__init__(env)
        single = env.single_observation_space
        parts = single.spaces if isinstance(single, spaces.Dict) else {}
        self._image_names = sorted(name for name in parts if name == "image" or name.startswith("image_"))
        if not self._image_names or "task_id" not in parts:
            raise ValueError(
                f"the vector environment's observation has the keys {sorted(parts)}; EncodeObservation needs image and "
                "task_id, as VLAObservation gives them."
            )
        self.encoder = encoder
        self.instructions = instruction_table(env)
        self._max_tokens = max_tokens or self._longest(parts[self._image_names[0]])
        self.single_observation_space = spaces.Dict(
            {
                "tokens": spaces.Box(-np.inf, np.inf, (self._max_tokens, encoder.feature_dim), np.float32),
                "mask": spaces.MultiBinary(self._max_tokens),
                **self._without_images(parts),
            }
        )
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self._tokens = np.zeros((env.num_envs, self._max_tokens, encoder.feature_dim), np.float32)
        self._mask = np.zeros((env.num_envs, self._max_tokens), np.int8)
        self._fingerprint = ""

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[dict, dict[str, Any]]:
        """Reset, wholly or by ``options["reset_mask"]``, and encode the rows that were reset."""
        rows = np.ones(self.num_envs, dtype=np.bool_)
        if options is not None and "reset_mask" in options:
            rows = np.array(options["reset_mask"])
        observations, infos = self.env.reset(seed=seed, options=options)
        if self.encoder.fingerprint != self._fingerprint:  # what was kept of the other rows is of another encoder
            rows = np.ones(self.num_envs, dtype=np.bool_)
        return self._encode(observations, rows, {})[0], infos

    def step(self, actions: Any) -> tuple[dict, Any, Any, Any, dict[str, Any]]:
        """Step and encode the new observations, and the final ones under ``SAME_STEP``."""
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        final: dict[int, dict[str, Any]] = {}
        if AutoresetMode(self.metadata["autoreset_mode"]) is AutoresetMode.SAME_STEP and "final_obs" in infos:
            final = {int(i): infos["final_obs"][i] for i in infos["_final_obs"].nonzero()[0]}
        encoded, final = self._encode(observations, np.ones(self.num_envs, dtype=np.bool_), final)
        if final:
            array = infos["final_obs"].copy()
            for i, observation in final.items():
                array[i] = observation
            infos = {**infos, "final_obs": array}
        return encoded, rewards, terminations, truncations, infos

    def _encode(
        self, observations: dict[str, np.ndarray], rows: np.ndarray, final: dict[int, dict[str, Any]]
    ) -> tuple[dict[str, np.ndarray], dict[int, dict[str, Any]]]:
        """Encode the given rows (bool [N]) and the final observations (by row) in one batch."""
        names = [*self._image_names, "task_id"]
        batch = {
            name: np.concatenate([observations[name][rows], *(np.asarray(obs[name])[None] for obs in final.values())])
            for name in names
        }
        tokens, mask = self._pad(self.encoder.encode(*self._inputs(batch)))
        count = int(rows.sum())
        self._tokens[rows], self._mask[rows] = tokens[:count], mask[:count]
        self._fingerprint = self.encoder.fingerprint
        encoded_final = {
            i: {"tokens": tokens[k], "mask": mask[k], **self._without_images(final[i])}
            for k, i in enumerate(final, start=count)
        }
        encoded = {"tokens": self._tokens.copy(), "mask": self._mask.copy(), **self._without_images(observations)}
        return encoded, encoded_final

    def _without_images(self, observation: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in observation.items() if name not in self._image_names}

    def _inputs(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, list[str]]:
        from vla_rl.policy import stack_cameras

        return stack_cameras(batch), instructions_for(self.instructions, batch["task_id"])

    def _longest(self, space: gym.Space) -> int:
        longest, table, size = 0, self.instructions, max(self.num_envs, 1)
        for chunk in (table[start : start + size] for start in range(0, len(table), size)):
            batch = {name: np.zeros((len(chunk), *(space.shape or ())), np.uint8) for name in self._image_names}
            images, _ = self._inputs({**batch, "task_id": np.zeros(len(chunk), np.int64)})
            longest = max(longest, self.encoder.encode(images, chunk).tokens.shape[1])
        return longest

    def _pad(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        tokens = features.tokens.float().cpu().numpy()
        mask = features.mask.cpu().numpy().astype(np.int8)
        missing = self._max_tokens - tokens.shape[1]
        if missing < 0:
            raise ValueError(
                f"the encoder gave {tokens.shape[1]} tokens, max_tokens is {self._max_tokens}; give a larger one."
            )
        return np.pad(tokens, ((0, 0), (0, missing), (0, 0))), np.pad(mask, ((0, 0), (0, missing)))


def instruction_table(env: VectorEnv) -> tuple[str, ...]:
    """The table of instructions that the ``task_id`` of every sub-environment points into.

    Raises:
        ValueError: if there is no table, or the sub-environments' tables differ.
    """
    layer = env
    while isinstance(layer, VectorWrapper) and "instructions" not in vars(layer):
        layer = layer.env
    base: Any = layer
    try:
        tables = [base.instructions] if hasattr(base, "instructions") else base.call("instructions")
    except Exception as error:
        raise ValueError(
            "the environments have no table `instructions`; wrap each in VLAObservation(env, instructions=[...])."
        ) from error
    table = tuple(tables[0])
    for i, other in enumerate(tables):
        if tuple(other) != table:
            raise ValueError(
                f"sub-environment {i} has the instructions {tuple(other)}, sub-environment 0 has {table}; give all "
                "of them one table and tell the tasks apart by task_id."
            )
    return table


def instructions_for(table: tuple[str, ...] | list[str], task_ids: Any) -> list[str]:
    """The instruction of every task id (int [N]).

    Raises:
        ValueError: if an id is not an index of the table.
    """
    ids = np.asarray(task_ids).reshape(-1)
    if ids.size and (ids.min() < 0 or ids.max() >= len(table)):
        raise ValueError(
            f"task_id {ids[(ids < 0) | (ids >= len(table))][0]} is not in the table of {len(table)} instructions; give "
            "an instruction for every task, or VLAObservation(task_id=) that of all episodes."
        )
    return [table[i] for i in ids]


def resize_area(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale a uint8 image [H, W, C] to ``size`` (height, width); a new pixel is the mean of the area that it covers."""
    height, width, channels = image.shape
    rows = _area_weights(height, size[0]) @ image.reshape(height, -1).astype(np.float32)
    columns = _area_weights(width, size[1]) @ rows.reshape(size[0], width, channels)
    return np.rint(columns).astype(np.uint8)


def _area_weights(old: int, new: int) -> np.ndarray:
    edges = np.arange(new + 1) * (old / new)
    overlap = np.minimum(edges[1:, None], np.arange(1, old + 1)) - np.maximum(edges[:-1, None], np.arange(old))
    weights = np.clip(overlap, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
