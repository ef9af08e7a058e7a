/* Preloaded into a daemon: writes through the page cache fail with the number in the file that
 * REFUSE_WRITES names, while it is there. */

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

ssize_t pwritev64(int fd, const struct iovec *pieces, int count, off_t offset)
{
    char number[8] = "";
    int told = open(getenv("REFUSE_WRITES"), O_RDONLY | O_CLOEXEC);
    if (told >= 0) {
        ssize_t length = read(told, number, sizeof(number) - 1);
        close(told);
        if (length > 0) {
            errno = atoi(number);
            return -1;
        }
    }
    return syscall(SYS_pwritev, fd, pieces, count, offset, offset >> 32);
}

ssize_t pwritev(int fd, const struct iovec *pieces, int count, off_t offset)
{
    return pwritev64(fd, pieces, count, offset);
}
