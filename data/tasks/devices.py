"""Requests to a dozen devices of a house, one to three calls each: the embedded set of fine-tuning.

As in toolcalls.py no argument value, opening or wording of an eval row occurs in training. Values are
numbers, times and codes, which are open sets: what is held out is a value, not a word of which the model
knows nothing, and answering from memory fails.
"""
from data.tasks import toolcalls
from data.tasks.toolcalls import Tool, draw_time, of_split, prompt, reward, solution
from data.tasks.world import lines

TOOLS = {
    'set_alarm': Tool('Set an alarm.', {'time': 'time'}, lines('''
        set an alarm for {time}
        put the alarm on {time}
        make the alarm ring at {time}
        the alarm is for {time}
        I need an alarm at {time}
        an alarm at {time}
        let the alarm ring at {time}
        let me have an alarm at {time}
        put an alarm on {time} for me
        at {time} the alarm should ring
        the alarm wakes me at {time}
        turn the alarm to {time}
    '''), lines('''
        let the alarm wake me at {time}
        set the alarm to {time}
    ''')),
    'set_timer': Tool('Start a timer.', {'minutes': 'number'}, lines('''
        set a timer for {minutes} minutes
        start a timer of {minutes} minutes
        make the timer ring in {minutes} minutes
        the timer is for {minutes} minutes
        I need a timer of {minutes} minutes
        a timer for {minutes} minutes
        let the timer ring in {minutes} minutes
        let me have a timer of {minutes} minutes
        count with the timer {minutes} minutes
        for {minutes} minutes the timer
        set for me a timer of {minutes} minutes
        turn the timer to {minutes} minutes
    '''), lines('''
        let the timer count {minutes} minutes
        put a timer on {minutes} minutes
    ''')),
    'set_heating': Tool('Set the heating.', {'degrees': 'number'}, lines('''
        set the heating to {degrees} degrees
        heating at {degrees} degrees
        put the heating on {degrees}
        make the heating {degrees} degrees
        I want the heating at {degrees}
        the heating should be {degrees} degrees
        let the heating be {degrees} degrees
        let me have the heating at {degrees}
        go with the heating to {degrees} degrees
        to {degrees} degrees with the heating
        set for me the heating to {degrees}
        have the heating on {degrees} degrees
    '''), lines('''
        turn the heating to {degrees}
        let the heating go to {degrees} degrees
    ''')),
    'set_volume': Tool('Set the volume.', {'level': 'number'}, lines('''
        set the volume to {level}
        volume {level}
        put the volume on {level}
        make the volume {level}
        I want the volume at {level}
        the volume should be {level}
        let the volume go to {level}
        let me have the volume at {level}
        go with the volume to {level}
        to {level} with the volume
        set for me the volume to {level}
        have the volume on {level}
    '''), lines('''
        turn the volume to {level}
        let the volume be {level}
    ''')),
    'dial': Tool('Dial a number.', {'number': 'code'}, lines('''
        dial {number}
        dial the number {number}
        I want to dial {number}
        dial {number} for me
        now dial {number}
        dial this number: {number}
        let me have you dial {number}
        dial the number {number} for me
        let us dial {number}
        the number to dial is {number}
        for me dial {number}
        I need to dial the number {number}
    '''), lines('''
        let me dial {number}
        dial for me the number {number}
    ''')),
    'open_door': Tool('Open the door.', {'code': 'code'}, lines('''
        open the door with the code {code}
        the door code is {code}
        door code {code}, open it
        open the door by {code}
        I want the door open, code {code}
        use {code} to open the door
        let me in by the door, code {code}
        let the door open, code {code}
        with {code} open the door for me
        the door opens with {code}
        open for me the door with {code}
        open it with {code}, the door
    '''), lines('''
        open with {code} the door
        let the door open by the code {code}
    ''')),
    'pay': Tool('Pay a bill.', {'amount': 'large', 'account': 'code'}, lines('''
        pay {amount} to account {account}
        pay account {account} the amount {amount}
        I want to pay {amount} to {account}
        pay {amount} into the account {account}
        to account {account} pay {amount}
        pay to {account} the sum {amount}
        let me pay {amount} to {account}
        pay for me {amount} to the account {account}
        pay the account {account} the sum {amount}
        the account {account} gets {amount}, pay it
        let the account {account} have the pay of {amount}
        {amount} to pay to the account {account}
    '''), lines('''
        pay the account {account} {amount}
        let me pay {amount} to the account {account}
    ''')),
    'book_table': Tool('Book a table.', {'people': 'number', 'time': 'time'}, lines('''
        book a table for {people} at {time}
        a table at {time} for {people} people
        I need a table for {people} at {time}
        book for {time} a table for {people}
        get a table at {time} for {people}
        a table for {people} people at {time}
        let me have a table at {time} for {people}
        book for me a table at {time} for {people}
        book at {time} for {people} a table
        for {people} people a table at {time}
        let us have a table for {people} at {time}
        find a table at {time} for {people} people
    '''), lines('''
        book for {people} a table at {time}
        let me have a table for {people} people at {time}
    ''')),
    'take_bus': Tool('Plan a bus ride.', {'line': 'large', 'time': 'time'}, lines('''
        take bus {line} at {time}
        the bus {line} at {time}
        at {time} I take the bus {line}
        I need the bus {line} at {time}
        plan the bus at {time}, line {line}
        bus line {line} at {time}
        let me take the bus {line} at {time}
        find for me the bus {line} at {time}
        take at {time} bus {line}
        find at {time} the bus {line}
        let us take bus {line} at {time}
        for {time} the bus {line}
    '''), lines('''
        find the bus {line} at {time}
        let me take at {time} the bus {line}
    ''')),
    'print_pages': Tool('Print pages.', {'first': 'number', 'last': 'large'}, lines('''
        print the pages {first} to {last}
        print from page {first} to {last}
        print page {first} until {last}
        I want to print pages {first} to {last}
        from {first} to {last} print the pages
        print pages {first} up to {last}
        let me print pages {first} to {last}
        print for me the pages {first} to {last}
        print the pages from {first} until {last}
        let the pages {first} to {last} print
        pages {first} until {last}, print them
        for me print from page {first} to {last}
    '''), lines('''
        let me print the pages from {first} to {last}
        print for me pages {first} until {last}
    ''')),
    'play_channel': Tool('Play a channel.', {'channel': 'large'}, lines('''
        play channel {channel}
        put on channel {channel}
        I want channel {channel}
        switch to channel {channel}
        the channel {channel}
        play the channel {channel}
        let me have channel {channel}
        let me see the channel {channel}
        turn on channel {channel}
        go to the channel {channel}
        hear channel {channel}
        for me channel {channel}
    '''), lines('''
        let me hear channel {channel}
        turn to the channel {channel}
    ''')),
    'water_plants': Tool('Water the plants.', {'liters': 'number', 'time': 'time'}, lines('''
        water the plants at {time} with {liters} liters
        give the plants {liters} liters at {time}
        at {time} water the plants, {liters} liters
        the plants need {liters} liters at {time}
        plants: {liters} liters at {time}
        with {liters} liters water the plants at {time}
        let the plants drink {liters} liters at {time}
        let me water the plants at {time} with {liters} liters
        water with {liters} liters at {time} the plants
        for the plants {liters} liters at {time}
        have the plants get {liters} liters at {time}
        water the plants with {liters} liters at {time}
    '''), lines('''
        let the plants have {liters} liters at {time}
        water at {time} the plants with {liters} liters
    ''')),
}


def draw_value(type, draw):
    if type == 'time':
        return draw_time(draw)
    if type == 'number':
        return draw.randint(2, 99)
    if type == 'large':
        return draw.randint(100, 999)
    return f'{draw.randint(0, 9999):04}'            # a code


def value(type, split, draw):
    """One argument value of a type that belongs to a split."""
    return of_split(split, lambda: draw_value(type, draw))


def problems(split, n, seed):
    """n problems, as in toolcalls.py; two or three tools on offer."""
    return toolcalls.problems(split, n, f'devices/{seed}', TOOLS, value, (2, 3))


def rows(split, n, seed):
    """n rows: messages, tools and metadata ('train', 'eval')."""
    return toolcalls.rows(split, n, seed, problems)
