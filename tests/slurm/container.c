/* A stand-in for pyxis, for tests: its options --container-image and --container-mounts, without containers.
 *
 * The "image" is a text file that names one folder of the host which the container does not have. A task gets a mount
 * namespace of its own in which that folder is empty but for what is mounted into it.
 *
 *     gcc -shared -fPIC -o container.so container.c
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

SPANK_PLUGIN(container, 1);

#define MOST_MOUNTS 32

static char *image, *mounts;

static int take_image(int val, const char *text, int remote)
{
	(void) val, (void) remote;
	image = strdup(text);
	return 0;
}

static int take_mounts(int val, const char *text, int remote)
{
	(void) val, (void) remote;
	mounts = strdup(text);
	return 0;
}

static struct spank_option image_option = { "container-image", "FILE", "the image", 1, 0, take_image };
static struct spank_option mounts_option = { "container-mounts", "A:B,...", "folders of the host", 1, 0, take_mounts };

int slurm_spank_init(spank_t task, int argc, char **argv)
{
	(void) argc, (void) argv;
	spank_context_t context = spank_context();
	if (context != S_CTX_LOCAL && context != S_CTX_REMOTE && context != S_CTX_ALLOCATOR)
		return 0;
	if (spank_option_register(task, &image_option) || spank_option_register(task, &mounts_option))
		return -1;
	return 0;
}

static int refuse(const char *what, const char *path)
{
	slurm_error("container: %s %s: %m", what, path);
	return -1;
}

static void make_folders(const char *path)
{
	char part[4096];
	snprintf(part, sizeof part, "%s", path);
	for (char *at = part + 1; *at; at++)
		if (*at == '/') {
			*at = 0;
			mkdir(part, 0755);
			*at = '/';
		}
	mkdir(part, 0755);
}

/* The folder that the image names, without the end of its line. */
static int hidden_folder(char *folder, int size)
{
	FILE *file = fopen(image, "r");
	if (!file || !fgets(folder, size, file))
		return refuse("cannot read the image", image);
	folder[strcspn(folder, "\n")] = 0;
	fclose(file);
	return 0;
}

int slurm_spank_task_init_privileged(spank_t task, int argc, char **argv)
{
	(void) task, (void) argc, (void) argv;
	char hidden[4096], *rest = NULL, *targets[MOST_MOUNTS];
	int sources[MOST_MOUNTS], count = 0;
	if (!image)
		return 0;
	if (hidden_folder(hidden, sizeof hidden))
		return -1;
	if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return refuse("no namespace for", image);
	/* The sources are opened before the folder they may lie in is hidden. */
	for (char *entry = mounts ? strtok_r(mounts, ",", &rest) : NULL; entry; entry = strtok_r(NULL, ",", &rest)) {
		char *target = strchr(entry, ':');
		if (!target || count == MOST_MOUNTS)
			return refuse("cannot take the mount", entry);
		*target++ = 0;
		targets[count] = target;
		if ((sources[count++] = open(entry, O_PATH)) < 0)
			return refuse("there is no", entry);
	}
	if (mount("tmpfs", hidden, "tmpfs", 0, "mode=0755"))
		return refuse("cannot hide", hidden);
	for (int i = 0; i < count; i++) {
		char source[64];
		snprintf(source, sizeof source, "/proc/self/fd/%d", sources[i]);
		make_folders(targets[i]);
		if (mount(source, targets[i], NULL, MS_BIND | MS_REC, NULL))
			return refuse("cannot mount", targets[i]);
		close(sources[i]);
	}
	return 0;
}
